"""Faults of packing rows for the cache: rotary channels, groups, codes and the types of scales.

Shapes: rows [R, C], values and scales as bytes [R, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ops.cache import pack_fp8, pack_index_fp4, pack_index_fp8
from ops.mutants.cache import _rows, _stored
from ops.mutants.core import BOTH, legal, mutant
from ops.mutants.quant import RULES, Rule, ruled
from ops.quant import quant_fp8

_ROWS, _INDEX8, _INDEX4 = "cache_insert_fp8", "index_insert_fp8", "index_insert_fp4"
_FULL = (torch.float32,)
Bytes = tuple[Tensor, Tensor]


def _repacked(pack: Callable[[Tensor, dict[str, Any]], Bytes]) -> Callable[[Tensor, Tensor, dict[str, Any]], Bytes]:
    return lambda v, s, a: pack(_rows(a), a)


def _rope(change: Callable[[Tensor], Tensor]) -> Any:
    """cache_insert_fp8 with change(rotary channels) -> bytes [R, 2 * rope_dim]."""

    def make(v: Tensor, s: Tensor, a: dict[str, Any]) -> Bytes:
        n = a["rope_dim"]
        return torch.cat((v[:, : -2 * n], change(_rows(a)[:, -n:].contiguous())), 1), s

    return _stored(_ROWS, make)


def _as_bytes(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _cut(t: Tensor) -> Tensor:
    return (t.float().view(torch.int32) >> 16).to(torch.int16)


def _through_fp8(t: Tensor) -> Tensor:
    return t.float().clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16()


def _grouped_by(group: int) -> Callable[[Tensor, dict[str, Any]], Bytes]:
    """Scales per `group` channels instead of 64, repeated where 64 are smaller."""

    def pack(rows: Tensor, a: dict[str, Any]) -> Bytes:
        def quantise(x: Tensor, *, group: int) -> Bytes:
            codes, scales = quant_fp8.reference(x, group=wide)
            groups = -(-x.shape[1] // group)
            at = (torch.arange(groups) * group // wide).clamp(max=scales.shape[1] - 1)
            return codes, scales.view(torch.uint8)[:, at].view(torch.float8_e8m0fnu)

        return pack_fp8(rows, a["rope_dim"], quantise)

    wide = group
    return pack


def _other_floor(rows: Tensor, a: dict[str, Any]) -> Bytes:
    return pack_fp8(rows, a["rope_dim"], partial(quant_fp8.reference, floor=448 * 2.0**-126))


mutant(_ROWS, "rope_fp8", "rotary channels pass through FP8")(_rope(lambda t: _as_bytes(_through_fp8(t))))
mutant(_ROWS, "rope_fp16", "rotary channels are stored in fp16")(_rope(lambda t: _as_bytes(t.half())))
mutant(_ROWS, "rope_lost", "rotary channels are zero")(_rope(lambda t: _as_bytes(t.bfloat16() * 0)))
mutant(_ROWS, "rope_cut_off", "rotary channels are cut off instead of rounded to bf16", dtypes=_FULL)(
    _rope(lambda t: _as_bytes(_cut(t)))
)
mutant(_ROWS, "rope_halves", "pairs of rotary channels are stored half a width apart")(
    _rope(lambda t: _as_bytes(torch.cat((t[:, 0::2], t[:, 1::2]), 1).bfloat16()))
)
mutant(_ROWS, "rope_first", "rotary channels lie in front of the FP8 ones")(
    _stored(_ROWS, lambda v, s, a: (v.roll(2 * a["rope_dim"], 1), s))
)
mutant(_ROWS, "bytes_swapped", "the bytes of rotary channels are in the opposite order")(
    _rope(lambda t: _as_bytes(t.bfloat16()).unflatten(1, (-1, 2)).flip(2).flatten(1))
)
mutant(_ROWS, "groups_of_128", "scales are those of groups of 128")(_stored(_ROWS, _repacked(_grouped_by(128))))
mutant(_ROWS, "groups_of_row", "a row has one scale")(_stored(_ROWS, _repacked(_grouped_by(4096))))
mutant(_ROWS, "floor_lost", "small rows take smaller scales than the floor allows")(_stored(_ROWS, _repacked(_other_floor)))
mutant(_ROWS, "padding_127", "the padding of scales holds the scale 1")(
    _stored(
        _ROWS, lambda v, s, a: (v, torch.where(torch.arange(s.shape[1]) < -(-(v.shape[1] - 2 * a["rope_dim"]) // 64), s, 127))
    )
)
mutant(_ROWS, "padding_kept", "the padding of scales keeps what the cache held")(
    _stored(
        _ROWS, lambda v, s, a: (v, torch.where(torch.arange(s.shape[1]) < -(-(v.shape[1] - 2 * a["rope_dim"]) // 64), s, 0xA5))
    )
)
mutant(_ROWS, "codes_shifted", "codes lie one byte further in their row")(_stored(_ROWS, lambda v, s, a: (v.roll(1, 1), s)))

# ---- index keys -----------------------------------------------------------------------------------------------------


def _scale(change: Callable[[Tensor], Tensor]) -> Any:
    """index_insert_fp8 with change(scales fp32 [R, 1]) -> bytes [R, 4]."""
    return _stored(_INDEX8, lambda v, s, a: (v, change(s.view(torch.float32))))


def _exponent_byte(scale: Tensor) -> Tensor:
    e = (torch.log2(scale).int() + 127).to(torch.uint8)
    return torch.nn.functional.pad(e, (0, 3))


def _not_power(rows: Tensor, a: dict[str, Any]) -> Bytes:
    scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale.view(torch.uint8)


def _by_32(rows: Tensor, a: dict[str, Any]) -> Bytes:
    return pack_index_fp8(rows, lambda x, *, group: _first_scale(*quant_fp8.reference(x, group=32)))


def _first_scale(codes: Tensor, scales: Tensor) -> Bytes:
    return codes, scales[:, :1]


mutant(_INDEX8, "scale_inverted", "the inverse scale is written")(_scale(lambda s: _as_bytes(1 / s)))
mutant(_INDEX8, "scale_e8m0", "the scale is one exponent byte instead of an fp32 number")(_scale(_exponent_byte))
mutant(_INDEX8, "scale_bytes_swapped", "the bytes of a scale are in the opposite order")(
    _scale(lambda s: s.view(torch.uint8).flip(1))
)
mutant(_INDEX8, "scale_times_448", "the largest magnitude is written instead of the scale")(_scale(lambda s: _as_bytes(s * 448)))
mutant(_INDEX8, "scale_not_power", "scales are no powers of two")(_stored(_INDEX8, _repacked(_not_power)))
mutant(_INDEX8, "groups_of_32", "codes have a scale per 32 channels, the first one is written")(
    _stored(_INDEX8, _repacked(_by_32))
)
mutant(_INDEX8, "floor_lost", "small keys take smaller scales than the floor allows")(
    _stored(_INDEX8, _repacked(lambda rows, a: pack_index_fp8(rows, partial(quant_fp8.reference, floor=448 * 2.0**-126))))
)
mutant(_INDEX4, "nibbles_swapped", "the high nibble holds the first channel")(
    _stored(_INDEX4, lambda v, s, a: ((v >> 4) | (v << 4), s))
)
mutant(_INDEX4, "nibbles_apart", "low nibbles hold the first half of a key")(_stored(_INDEX4, lambda v, s, a: (_apart(v), s)))
mutant(_INDEX4, "sign_lost", "codes have no sign")(_stored(_INDEX4, lambda v, s, a: (v & 0x77, s)))
mutant(_INDEX4, "groups_of_key", "all groups of a key have its first scale")(
    _stored(_INDEX4, lambda v, s, a: (v, s[:, :1].expand_as(s)))
)


def _apart(v: Tensor) -> Tensor:
    codes = torch.stack((v & 15, v >> 4), 2).flatten(1)
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


# ---- the quantiser inside -------------------------------------------------------------------------------------------


def _by_rule(op: str, rule: Rule) -> Any:
    """The op with values quantised by `rule`."""
    quantise = partial(ruled("quant_mxfp4" if op == _INDEX4 else "quant_fp8", rule), None)

    def pack(rows: Tensor, a: dict[str, Any]) -> Bytes:
        if op == _ROWS:
            return pack_fp8(rows, a["rope_dim"], quantise)
        return pack_index_fp8(rows, quantise) if op == _INDEX8 else pack_index_fp4(rows, quantise)

    return _stored(op, _repacked(pack))


_OWN = ("floor_lost", "through_bf16", "exponent_off", "scale_inverted", "amax_of_row", "groups_shifted")
"""Faults of quantisers that mean nothing here, or are above under the same name."""
for _op in (_ROWS, _INDEX8, _INDEX4):
    for _name, _what, _rule, _dtypes in RULES:
        if _name not in _OWN and not (_op == _INDEX4 and _name == "sign_lost"):
            mutant(_op, _name, _what, dtypes=_dtypes or BOTH)(_by_rule(_op, _rule))
    legal(_op, "not_clamped", "codes are not clamped before they are encoded")(
        _by_rule(_op, Rule(fp8=lambda v: v.to(torch.float8_e4m3fn).view(torch.uint8)))
    )
