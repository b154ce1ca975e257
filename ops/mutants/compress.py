"""Faults and legal variants of compress.

Shapes: T tokens, m ratio, c entry width, w = 2c with overlapping windows or c without, E entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops import compress as op
from ops.mutants.core import arguments, legal, mutant
from ops.norm import rms_norm
from ops.rope import rope

_OP = "compress"
Pool = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[Tensor, dict[str, Any]], Tensor]


def _softmax_pool(k: Tensor, s: Tensor) -> Tensor:
    return (torch.softmax(s, 0) * k).sum(0)


def _computed(
    a: dict[str, Any], *, pool: Pool = _softmax_pool, rows: Rows = lambda r, a: r, windows: Any = op._windows, finish: Any = None
) -> Tensor:
    """The op in fp32 with one of its parts replaced; writes the state as it should be written."""
    tokens, c = int(a["cu_seqlens"][-1]), a["norm_weight"].shape[0]
    ape_T = a["ape"].float()[op._positions(a["cu_seqlens"], a["start_pos"]) % a["ratio"]]
    right = op._project(a["x_TD"][:tokens].float(), a["wkv"].float(), a["wgate"].float(), ape_T)
    batch = (a["state"], a["state_table"], a["cu_seqlens"], a["start_pos"])
    pooled = [pool(k, s) for k, s in windows(rows(right, a), *batch, a["ratio"], c)]
    op._store(right, *batch)
    entries = torch.zeros(a["cos_ER2"].shape[0], c)
    if n := len(pooled):
        cos, sin = a["cos_ER2"][:n], a["sin_ER2"][:n]
        stacked = torch.stack(pooled)
        if finish is None:
            entries[:n] = rope.reference(rms_norm.reference(stacked, a["norm_weight"], eps=a["eps"]), cos, sin)
        else:
            entries[:n] = finish(stacked, cos, sin, a)
    return entries.to(a["x_TD"].dtype)


def _part(**parts: Any) -> Callable[..., Tensor]:
    return lambda call, *args, **kwargs: _computed(arguments(_OP, args, kwargs), **parts)


def _changed(**changes: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(_OP, args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


# ---- what is pooled -------------------------------------------------------------------------------------------------

mutant(_OP, "ape_lost", "the position bias of the gates is not added")(_part(rows=lambda r, a: _without_ape(r, a)))
mutant(_OP, "value_and_gate_swapped", "wkv and wgate change places")(_changed(wkv=lambda a: a["wgate"], wgate=lambda a: a["wkv"]))
mutant(_OP, "mean_pool", "tokens are averaged instead of weighted by the softmax of their gates")(
    _part(pool=lambda k, s: k.mean(0))
)
mutant(_OP, "softmax_over_channels", "the softmax runs over channels instead of tokens")(
    _part(pool=lambda k, s: (torch.softmax(s, 1) * k).sum(0))
)
mutant(_OP, "gates_bf16", "gates are stored in bf16 before the softmax")(
    _part(pool=lambda k, s: (torch.softmax(s.bfloat16().float(), 0) * k).sum(0))
)
mutant(_OP, "last_token_lost", "the newest token of each window is not pooled")(
    _part(pool=lambda k, s: _softmax_pool(k[:-1], s[:-1]))
)


def _without_ape(rows: Tensor, a: dict[str, Any]) -> Tensor:
    w = rows.shape[1] // 2
    ape_T = a["ape"].float()[op._positions(a["cu_seqlens"], a["start_pos"]) % a["ratio"]]
    return torch.cat((rows[:, :w], rows[:, w:] - ape_T), 1)


def _relative_ape(rows: Tensor, a: dict[str, Any]) -> Tensor:
    w = rows.shape[1] // 2
    positions = op._positions(a["cu_seqlens"], a["start_pos"])
    relative = op._positions(a["cu_seqlens"], torch.zeros_like(a["start_pos"]))
    ape = a["ape"].float()
    return torch.cat((rows[:, :w], rows[:, w:] - ape[positions % a["ratio"]] + ape[relative % a["ratio"]]), 1)


mutant(_OP, "ape_chunk_relative", "the position bias is looked up by the place in the call, not by the absolute position")(
    _part(rows=_relative_ape)
)


def _no_overlap(rows: Tensor, *batch: Any) -> Any:
    ratio = batch[-2]
    for k, s in op._windows(rows, *batch):
        yield k[-ratio:], s[-ratio:]


def _zero_before_first(rows: Tensor, state: Tensor, table: Tensor, cu: Tensor, start: Tensor, ratio: int, c: int) -> Any:
    found = op._windows(rows, state, table, cu, start, ratio, c)
    for (_, i), (k, s) in zip(op.entry_list(cu, start, ratio), found, strict=True):
        missing = rows.shape[1] // 2 > c and i == 0
        yield (torch.cat((k * 0, k)), torch.cat((s * 0, s))) if missing else (k, s)


def _stale(rows: Tensor, state: Tensor, table: Tensor, cu: Tensor, start: Tensor, ratio: int, c: int) -> Any:
    """The block before comes from the state even where this call computes it."""
    found = op._windows(rows, state, table, cu, start, ratio, c)
    for (b, i), (k, s) in zip(op.entry_list(cu, start, ratio), found, strict=True):
        w = rows.shape[1] // 2
        if w > c and i > 0:
            at = [divmod(p, state.shape[1]) for p in range((i - 1) * ratio, i * ratio)]
            old = torch.stack([state[int(table[b, block]), row] for block, row in at]).float()
            yield torch.cat((old[:, :c], k[ratio:])), torch.cat((old[:, w : w + c], s[ratio:]))
        else:
            yield k, s


def _halves(rows: Tensor, state: Tensor, *rest: Any) -> Any:
    c, w = rest[-1], rows.shape[1] // 2
    if w == c:
        yield from op._windows(rows, state, *rest)
        return

    def swapped(t: Tensor) -> Tensor:
        return torch.cat((t[..., c:w], t[..., :c], t[..., w + c :], t[..., w : w + c]), -1)

    yield from op._windows(swapped(rows), swapped(state), *rest)


mutant(_OP, "overlap_lost", "the block before is not pooled into an entry")(_part(windows=_no_overlap))
mutant(_OP, "overlap_of_first", "entry 0 pools a block of zeros in front of it")(_part(windows=_zero_before_first))
mutant(_OP, "overlap_stale", "the block before is read from the state although this call computes it")(_part(windows=_stale))
mutant(_OP, "halves_swapped", "first and second half of the projections change places")(_part(windows=_halves))

# ---- norm and rotation ----------------------------------------------------------------------------------------------

mutant(_OP, "rope_next_entry", "each entry is rotated by the position of the next one")(
    _changed(cos_ER2=lambda a: a["cos_ER2"].roll(-1, 0), sin_ER2=lambda a: a["sin_ER2"].roll(-1, 0))
)
mutant(_OP, "rope_backwards", "entries are rotated the other way")(_changed(sin_ER2=lambda a: -a["sin_ER2"]))
mutant(_OP, "rope_before_norm", "entries are rotated before the norm's weight is applied")(
    _part(finish=lambda x, cos, sin, a: rms_norm.reference(rope.reference(x, cos, sin), a["norm_weight"], eps=a["eps"]))
)
mutant(_OP, "norm_weight_lost", "the norm has no weight")(_changed(norm_weight=lambda a: torch.ones_like(a["norm_weight"])))
mutant(_OP, "norm_lost", "entries are not normed")(
    _part(finish=lambda x, cos, sin, a: rope.reference(x * a["norm_weight"].float(), cos, sin))
)

# ---- the state ------------------------------------------------------------------------------------------------------


@mutant(_OP, "state_not_stored", "tokens of the call are not written to the state")
def _not_stored(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    before = a["state"].clone()
    found = call(**a)
    a["state"].copy_(before)
    return found


@mutant(_OP, "state_bf16", "the state is kept in bf16")
def _state_bf16(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    found = call(**a)
    a["state"].copy_(a["state"].bfloat16().float())
    return found


@mutant(_OP, "state_without_ape", "gates are stored before the position bias is added")
def _state_without_ape(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    found = call(**a)
    tokens = int(a["cu_seqlens"][-1])
    nothing = torch.zeros(tokens, a["ape"].shape[1])
    rows = op._project(a["x_TD"][:tokens].float(), a["wkv"].float(), a["wgate"].float(), nothing)
    op._store(rows, a["state"], a["state_table"], a["cu_seqlens"], a["start_pos"])
    return found


# ---- legal ----------------------------------------------------------------------------------------------------------

legal(_OP, "tokens_reversed", "tokens of a window pooled from the newest to the oldest")(
    _part(pool=lambda k, s: _softmax_pool(k.flip(0), s.flip(0)))
)
legal(_OP, "online", "softmax as sums of exp of the gates less their maximum, divided once at the end")(
    _part(pool=lambda k, s: ((e := torch.exp(s - s.amax(0))) * k).sum(0) / e.sum(0))
)
legal(_OP, "cast_before_norm", "the pooled value is rounded to bf16 before the norm", dtypes=(torch.bfloat16,))(
    _part(pool=lambda k, s: _softmax_pool(k, s).bfloat16().float())
)
legal(_OP, "channels_permuted", "the projections summed in another order")(
    lambda call, *args, **kwargs: call(
        **{
            **(a := arguments(_OP, args, kwargs)),
            "x_TD": a["x_TD"].flip(1).contiguous(),
            "wkv": a["wkv"].flip(1).contiguous(),
            "wgate": a["wgate"].flip(1).contiguous(),
        }
    )
)
