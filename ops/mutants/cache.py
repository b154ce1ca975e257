"""Faults and legal variants of writing rows into paged caches, plain or packed.

Shapes: cache [blocks, P, W], rows [R, C], slots [R]; a packed block holds the values of all rows, then their scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cache import block_parts, pack_fp8, pack_index_fp4, pack_index_fp8
from ops.mutants.core import arguments, legal, mutant
from ops.quant import quant_fp8, quant_mxfp4

PACKED = ("cache_insert_fp8", "index_insert_fp8", "index_insert_fp4")
ALL = ("cache_insert", *PACKED)
Parts = Sequence[Tensor]
_FULL = (torch.float32,)


def _rows(a: dict[str, Any]) -> Tensor:
    return next(a[name] for name in a if name.startswith("rows"))


def _with_rows(a: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {n: change(v).contiguous() if n.startswith("rows") else v for n, v in a.items()}


def _slots(op: str, change: Callable[[Tensor, int, int], Tensor]) -> Any:
    """The correct op with slots from change(slots, rows per block, slots of the cache); those outside the cache are skipped."""

    def body(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        cache, slots = a["cache"], a["slots"]
        total = cache.shape[0] * cache.shape[1]
        new = change(slots, cache.shape[1], total)
        call(**{**a, "slots": torch.where(new < total, new, -1)})

    return body


def _which(op: str, keep: Callable[[Tensor, int], Tensor]) -> Any:
    """The correct op on those rows that keep(slots, rows per block) [R] is true for."""

    def body(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        call(**{**a, "slots": torch.where(keep(a["slots"], a["cache"].shape[1]), a["slots"], -1)})

    return body


def _moved(s: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.where(s >= 0, change(s), s)


def _compacted(rows: Tensor, slots: Tensor) -> Tensor:
    place = (slots >= 0).long().cumsum(0) - 1
    return rows[place.clamp(min=0)]


for _op in ALL:
    for _name, _what, _change in (
        ("skipped_to_end", "-1 is taken for the last slot", lambda s, p, n: torch.where(s < 0, n - 1, s)),
        ("skipped_to_start", "-1 is taken for slot 0", lambda s, p, n: s.clamp(min=0)),
        ("skipped_beside_start", "-1 is taken for slot 1", lambda s, p, n: s.abs()),
        ("one_further", "rows lie one slot further", lambda s, p, n: _moved(s, lambda t: t + 1)),
        ("one_before", "rows lie one slot before theirs", lambda s, p, n: _moved(s, lambda t: (t - 1).clamp(min=0))),
        ("slot_7_bits", "slots are kept in 7 bits", lambda s, p, n: _moved(s, lambda t: t & 127)),
        (
            "block_and_row",
            "block and row within it change places",
            lambda s, p, n: _moved(s, lambda t: t % p * (n // p) + t // p),
        ),
        ("next_block", "rows lie one block further", lambda s, p, n: _moved(s, lambda t: t + p)),
        ("row_of_block_lost", "all rows of a block lie in its first", lambda s, p, n: _moved(s, lambda t: t // p * p)),
        ("slots_of_next_row", "each row takes the slot of the next one", lambda s, p, n: s.roll(-1)),
    ):
        allowed = (_op, _name) == ("cache_insert", "skipped_to_start")  # plain rows may land in the null block
        (legal if allowed else mutant)(_op, _name, _what)(_slots(_op, _change))
    for _name, _what, _keep in (
        ("first_block_only", "rows go to the first block only", lambda s, p: s // p == s[:1] // p),
        ("last_row_lost", "the last row of the call is not written", lambda s, p: torch.arange(len(s)) < len(s) - 1),
        ("stops_at_skipped", "writing ends at the first slot of -1", lambda s, p: (s < 0).long().cumsum(0) == 0),
        ("slot_zero_of_block_lost", "the first row of a block is not written", lambda s, p: s % p != 0),
    ):
        mutant(_op, _name, _what)(_which(_op, _keep))


def _declared(op: str) -> None:
    @mutant(op, "rows_compacted", "the n-th row goes to the n-th slot that is not -1")
    def compacted(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        call(**_with_rows(a, lambda rows: _compacted(rows, a["slots"])))

    @mutant(op, "rows_bf16", "rows pass through bf16", dtypes=_FULL)
    def low(call: Any, *args: Any, **kwargs: Any) -> None:
        call(**_with_rows(arguments(op, args, kwargs), lambda rows: rows.bfloat16().float()))

    @mutant(op, "rest_cleared", "rows of the cache that are not written are set to zero")
    def cleared(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        if bool((a["slots"] >= 0).any()):
            a["cache"].zero_()
        call(**a)

    @mutant(op, "null_block_written", "the first byte of the null block is changed")
    def null(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        call(**a)
        if a["cache"].numel():
            a["cache"].view(torch.uint8).view(-1)[0] ^= 1

    @legal(op, "row_by_row", "one call for each row, the last row first")
    def single(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        for r in reversed(range(len(a["slots"]))):
            one = slice(r, r + 1)
            call(**{n: v[one] if n == "slots" or n.startswith("rows") else v for n, v in a.items()})

    @legal(op, "skipped_taken_out", "rows with a slot of -1 are taken out first")
    def taken_out(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        kept = a["slots"] >= 0
        call(**{**_with_rows(a, lambda rows: rows[kept]), "slots": a["slots"][kept]})


for _op in ALL:
    _declared(_op)


@mutant("cache_insert", "added", "rows are added to what the cache holds")
def _added(call: Any, cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    before = cache.clone()
    call(cache, rows_RW, slots)
    for slot in slots[slots >= 0].tolist():
        cache.view(-1, cache.shape[2])[slot] += before.view(-1, cache.shape[2])[slot]


@mutant("cache_insert", "last_channel_lost", "the last channel of each row is not written")
def _channel_lost(call: Any, cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    last = cache[..., -1].clone()
    call(cache, rows_RW, slots)
    cache[..., -1] = last


@legal("cache_insert", "indexed", "one indexed write")
def _indexed(call: Any, cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    kept = slots >= 0
    cache.view(-1, cache.shape[2])[slots[kept]] = rows_RW[kept]


# ---- packed rows ----------------------------------------------------------------------------------------------------


def _packed(op: str, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and scales of each row as bytes."""
    rows = _rows(a)
    if op == "cache_insert_fp8":
        return pack_fp8(rows, a["rope_dim"], quant_fp8.reference)
    return pack_index_fp8(rows, quant_fp8.reference) if op == "index_insert_fp8" else pack_index_fp4(rows, quant_mxfp4.reference)


def _stored(
    op: str,
    change: Callable[[Tensor, Tensor, dict[str, Any]], Parts] = lambda v, s, a: (v, s),
    parts: Callable[[Tensor, int], Parts] = block_parts,
) -> Any:
    """The op with other bytes of values and scales (same widths), or other places of them in a block."""

    def body(call: Any, *args: Any, **kwargs: Any) -> None:
        a = arguments(op, args, kwargs)
        values, scales = _packed(op, a)
        new = change(values, scales, a)
        kept, p = a["slots"] >= 0, a["cache"].shape[1]
        for part, data in zip(parts(a["cache"], values.shape[1]), new, strict=True):
            part[a["slots"][kept] // p, a["slots"][kept] % p] = data[kept]

    return body


def _row_by_row(cache: Tensor, width: int) -> Parts:
    return cache[..., :width], cache[..., width:]


def _scales_first(cache: Tensor, width: int) -> Parts:
    flat, scales = cache.view(cache.shape[0], -1), cache.shape[2] - width
    at = cache.shape[1] * scales
    return flat[:, at:].unflatten(1, (cache.shape[1], width)), flat[:, :at].unflatten(1, (cache.shape[1], scales))


def _behind_cache(cache: Tensor, width: int) -> Parts:
    """All values of the cache first, all scales at its end."""
    rows, scales = cache.shape[0] * cache.shape[1], cache.shape[2] - width
    flat = cache.view(-1)
    return flat[: rows * width].view(*cache.shape[:2], width), flat[rows * width :].view(*cache.shape[:2], scales)


def _scales_by_columns(cache: Tensor, width: int) -> Parts:
    values, scales = block_parts(cache, width)
    at, n = cache.shape[1] * width, scales.shape[2]
    return values, cache.view(cache.shape[0], -1)[:, at:].unflatten(1, (n, cache.shape[1])).transpose(1, 2)


for _op in PACKED:
    for _name, _what, _parts in (
        ("scales_behind_row", "the scales lie behind each row instead of behind the block's rows", _row_by_row),
        ("scales_first", "the scales of a block lie in front of its values", _scales_first),
        ("scales_behind_cache", "the scales lie behind the whole cache", _behind_cache),
    ):
        mutant(_op, _name, _what)(_stored(_op, parts=_parts))
    mutant(_op, "scales_not_written", "scales are not written")(
        _stored(_op, lambda v, s, a: (v,), lambda cache, width: block_parts(cache, width)[:1])
    )
    mutant(_op, "scale_of_next_row", "each row has the scales of the next one")(_stored(_op, lambda v, s, a: (v, s.roll(-1, 0))))
    mutant(_op, "scales_of_first_row", "all rows of a call have the scales of the first")(
        _stored(_op, lambda v, s, a: (v, s[:1].expand_as(s)))
    )
    legal(_op, "parts_indexed", "one indexed write for values and one for scales")(_stored(_op))
for _op in ("cache_insert_fp8", "index_insert_fp4"):
    mutant(_op, "scales_by_columns", "scales of a block lie group by group")(_stored(_op, parts=_scales_by_columns))
    mutant(_op, "exponent_off", "scales are one exponent too large")(
        _stored(_op, lambda v, s, a: (v, torch.where(s > 0, s + 1, s)))
    )
    mutant(_op, "group_scales_reversed", "the scales of a row come in the opposite order")(
        _stored(_op, lambda v, s, a: (v, s.flip(1)))
    )
