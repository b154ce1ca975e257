"""Faults and legal variants of the dequantisers with E8M0 scales. Shapes: codes [T, K] or [N, K]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import arguments, legal, mutant
from ops.quant import e8m0_values
from ops.quant_fp4 import FP4_VALUES, fp4_values, unpack_fp4

_FP8 = ("dequant_fp8", "dequant_fp8_block")
_E8M0 = (*_FP8, "dequant_mxfp4")
Same = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _fp8(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _fp4(packed: Tensor) -> Tensor:
    return fp4_values(unpack_fp4(packed))


def _spread(op: str, a: dict[str, Any], scale: Tensor, shape: torch.Size) -> Tensor:
    if op == "dequant_fp8_block":
        return scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    return scale.repeat_interleave(a.get("group", 32), -1)[..., : shape[-1]]


def _decoded(op: str, codes: Same | None = None, number: Same = e8m0_values, scale: Same = _same, after: Same = _same) -> Any:
    """The op with other values of its code bytes, other bytes (`scale`) or another `number` of a scale, another result."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(op, args, kwargs)
        stored = a["w_NK" if op == "dequant_fp8_block" else "q"].view(torch.uint8)
        values = (codes or (_fp4 if op == "dequant_mxfp4" else _fp8))(stored)
        bytes_ = scale(a["scale"].view(torch.uint8)).contiguous().view(torch.float8_e8m0fnu)
        return after(values * _spread(op, a, number(bytes_), values.shape)).to(a["dtype"])

    return body


def _as_number(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8).float()


def _small_flushed(scale: Tensor) -> Tensor:
    return torch.where(scale.view(torch.uint8) < 103, torch.zeros(()), e8m0_values(scale))


_FAULTS: tuple[tuple[str, str, dict[str, Same]], ...] = (
    ("exponent_bias_126", "the exponent of a scale is one too large", {"scale": lambda s: s + 1}),
    ("scale_inverted", "codes are divided by their scale", {"scale": lambda s: 254 - s}),
    ("scale_lost", "codes are not scaled", {"scale": lambda s: s * 0 + 127}),
    ("scale_of_next_row", "scales are those of the next row", {"scale": lambda s: s.roll(-1, 0)}),
    ("scale_of_next_group", "scales are those of the next group", {"scale": lambda s: s.roll(-1, -1)}),
    ("scale_by_columns", "scales are read column by column", {"scale": lambda s: s.T.reshape(s.shape)}),
    ("scale_of_first_group", "a row has one scale: that of its first group", {"scale": lambda s: s[..., :1].expand_as(s)}),
    ("scale_byte_as_number", "the byte of a scale is read as a number", {"number": _as_number}),
    ("small_scales_flushed", "scales below 2^-24 are taken for zero", {"number": _small_flushed}),
    ("sign_lost", "the sign of the codes is lost", {"after": torch.abs}),
    ("through_fp16", "values pass through fp16", {"after": lambda y: y.half().float()}),
)
for _op in _E8M0:
    for _name, _what, _parts in _FAULTS:
        mutant(_op, _name, _what)(_decoded(_op, **_parts))


def _subnormals_lost(codes: Tensor) -> Tensor:
    return torch.where((codes & 0x78) == 0, torch.zeros(()), _fp8(codes))


for _op in _FP8:
    mutant(_op, "subnormals_lost", "subnormal codes are taken for zero")(_decoded(_op, _subnormals_lost))
    mutant(_op, "codes_fnuz", "codes are read in the other FP8 format")(
        _decoded(_op, lambda c: c.view(torch.float8_e4m3fnuz).float().nan_to_num())
    )
    mutant(_op, "codes_e5m2", "codes are read with five exponent bits")(
        _decoded(_op, lambda c: c.view(torch.float8_e5m2).float().nan_to_num())
    )
    mutant(_op, "codes_integer", "codes are read as integers")(_decoded(_op, lambda c: c.view(torch.int8).float()))


def _table(*numbers: float) -> Same:
    return lambda packed: torch.tensor(numbers)[unpack_fp4(packed).long()]


def _apart(packed: Tensor) -> Tensor:
    return fp4_values(torch.cat((packed & 15, packed >> 4), -1))


_NEGATIVE = tuple(-v for v in FP4_VALUES)
for _name, _what, _codes in (
    ("nibbles_swapped", "the high nibble is taken for the first channel", lambda p: _fp4((p >> 4) | (p << 4))),
    ("nibbles_apart", "low nibbles are taken for the first half of a row", _apart),
    ("table_ends_in_8", "the largest value is 8", _table(*FP4_VALUES[:-1], 8.0, *_NEGATIVE[:-1], -8.0)),
    ("half_lost", "the subnormal value 0.5 is taken for zero", _table(0.0, 0.0, *FP4_VALUES[2:], 0.0, 0.0, *_NEGATIVE[2:])),
    ("codes_int4", "codes are read as integers in two's complement", _table(*map(float, range(8)), *map(float, range(-8, 0)))),
    ("sign_in_low_bit", "the lowest bit is taken for the sign", lambda p: _fp4(((p >> 1) & 0x77) | ((p & 0x11) << 3))),
):
    mutant("dequant_mxfp4", _name, _what)(_decoded("dequant_mxfp4", _codes))


@mutant("dequant_fp8", "group_ignored", "groups are 128 wide, whatever is asked for")
def _group_ignored(call: Any, q: Tensor, scale: Tensor, *, group: int = 128, dtype: torch.dtype) -> Tensor:
    return call(q, scale[:, : -(-q.shape[1] // 128)].contiguous(), group=128, dtype=dtype)


@mutant("dequant_fp8_block", "blocks_of_64", "blocks are taken to be 64 rows high")
def _blocks_of_64(call: Any, w_NK: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    rows = (torch.arange(w_NK.shape[0]) // 64).clamp(max=max(len(scale) - 1, 0))
    return (w_NK.float() * e8m0_values(scale)[rows].repeat_interleave(128, 1)[:, : w_NK.shape[1]]).to(dtype)


# ---- legal ----------------------------------------------------------------------------------------------------------


def _powers(scale: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(scale.shape), scale.view(torch.uint8).int() - 127)


def _by_bits(codes: Tensor) -> Tensor:
    """e4m3 from its fields; subnormal codes have an exponent of -6 and no leading one."""
    field, fraction = ((codes >> 3) & 15).int(), (codes & 7).float()
    magnitude = torch.ldexp(fraction / 8 + (field > 0), field.clamp(min=1) - 7)
    return torch.where(codes >= 128, -magnitude, magnitude)


for _op in _E8M0:
    legal(_op, "scale_by_ldexp", "scales made by shifting 1")(_decoded(_op, number=_powers))
    legal(_op, "fp64", "multiplied in float64 and rounded once")(_decoded(_op, number=lambda s: e8m0_values(s, torch.float64)))
for _op in _FP8:
    legal(_op, "codes_by_bits", "codes decoded field by field")(_decoded(_op, _by_bits))
