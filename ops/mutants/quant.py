"""Faults and legal variants of the quantisers to FP8 and FP4 and of the round trips through them.

Shapes: x [T, K], groups [T, G, n] of n channels, amax and exponent [T, G].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import arguments, legal, mutant
from ops.quant import FP8_MAX, MXFP8_FLOOR, e8m0_values, grouped, power_of_two_exponent
from ops.quant_fp4 import FP4_FLOOR, fp4_codes, fp4_values

_FP8 = ("quant_fp8", "quant_mxfp8", "roundtrip_fp8")
_FP4 = ("quant_mxfp4", "roundtrip_fp4")
_QUANTISERS = ("quant_fp8", "quant_mxfp8", "quant_mxfp4")
_FULL = (torch.float32,)
Same = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _amax(g: Tensor) -> Tensor:
    return g.abs().amax(-1)


def _floored(amax: Tensor, floor: float) -> Tensor:
    return amax.clamp(min=floor)


def _fp8_bytes(v: Tensor) -> Tensor:
    return v.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _scaled(g: Tensor, exponent: Tensor) -> Tensor:
    return torch.ldexp(g, -exponent[..., None])


@dataclass(frozen=True)
class Rule:
    """How values become codes and scales, part by part; the defaults are the contracts'.

    `before` changes x, `round` the scaled values before they are encoded, `codes` the codes behind it ([T, G, n] bytes, FP4 one
    code each), `stored` the exponents that are written; `group` and `floor` replace the op's own.
    """

    before: Same = _same
    amax: Callable[[Tensor], Tensor] = _amax
    floored: Callable[[Tensor, float], Tensor] = _floored
    exponent: Callable[[Tensor, float], Tensor] = power_of_two_exponent
    scaled: Callable[[Tensor, Tensor], Tensor] = _scaled
    round: Callable[[Tensor, int, int], Tensor] = lambda v, lowest, bits: v
    fp8: Same = _fp8_bytes
    fp4: Same = fp4_codes
    codes: Same = _same
    stored: Same = _same
    group: Callable[[int], int] = lambda n: n
    floor: Callable[[float], float] = lambda f: f


def _bytes_of(exponent: Tensor) -> Tensor:
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


def _coded(rule: Rule, x: Tensor, group: int, floor: float, fp4: bool) -> tuple[Tensor, Tensor]:
    """Codes [T, K] (one a byte) and exponents [T, groups of the op] as written."""
    n = rule.group(group)
    g = grouped(rule.before(x.float()), n)
    exponent = rule.exponent(rule.floored(rule.amax(g), rule.floor(floor)), 6.0 if fp4 else FP8_MAX)
    v = rule.round(rule.scaled(g, exponent), 0 if fp4 else -6, 1 if fp4 else 3)
    codes = rule.codes((rule.fp4 if fp4 else rule.fp8)(v)).flatten(-2)[..., : x.shape[-1]]
    if n != group:
        exponent = exponent.repeat_interleave(n, -1)[..., : x.shape[-1] : group]
    return codes, rule.stored(exponent)


def _values(codes: Tensor, exponent: Tensor, group: int, fp4: bool) -> Tensor:
    plain = fp4_values(codes) if fp4 else codes.view(torch.float8_e4m3fn).float()
    scale = e8m0_values(_bytes_of(exponent).view(torch.float8_e8m0fnu))
    return plain * scale.repeat_interleave(group, -1)[..., : codes.shape[-1]]


def ruled(op: str, rule: Rule, pack: Same | None = None) -> Any:
    """The quantiser or round trip `op` by `rule`; `pack` replaces the packing of FP4 codes [T, K] -> [T, K/2]."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a, fp4 = arguments(op, args, kwargs), op in _FP4
        group = 32 if op == "quant_mxfp8" else a.get("group", 32)
        floor = FP4_FLOOR if fp4 else MXFP8_FLOOR if op == "quant_mxfp8" else a.get("floor", 1e-4)
        if op in _QUANTISERS:
            codes, exponent = _coded(rule, a["x_TK"], group, floor, fp4)
            scale = _bytes_of(exponent).contiguous().view(torch.float8_e8m0fnu)
            return ((pack or _packed)(codes) if fp4 else codes.contiguous().view(torch.float8_e4m3fn)), scale
        x, channels = a["x"], a.get("channels", a["x"].shape[-1])
        back = _values(*_coded(rule, x[..., :channels].reshape(-1, channels), group, floor, fp4), group, fp4)
        return torch.cat((back.view(*x.shape[:-1], channels).to(x.dtype), x[..., channels:]), -1)

    return body


def _packed(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _on_grid(mode: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
    """Rounds values to the format's grid by `mode`, which rounds to integers; the encoding behind it is then exact."""

    def rounding(v: Tensor, lowest: int, bits: int) -> Tensor:
        step = (torch.frexp(v).exponent - 1).clamp(min=lowest) - bits
        return torch.copysign(torch.ldexp(mode(torch.ldexp(v, -step)), step), v)

    return rounding


def _flushed(v: Tensor, lowest: int, bits: int) -> Tensor:
    return torch.where(v.abs() < 2.0**lowest, torch.copysign(torch.zeros(()), v), v)


def _down(amax: Tensor, largest: float) -> Tensor:
    return torch.log2(amax.double() / largest).floor().int()


def _nearest(amax: Tensor, largest: float) -> Tensor:
    return torch.log2(amax.double() / largest).round().int()


def _by_log(amax: Tensor, largest: float) -> Tensor:
    return torch.log2(amax / largest).ceil().int()


def _always_next(amax: Tensor, largest: float) -> Tensor:
    return _down(amax, largest) + 1


def _half_away(t: Tensor) -> Tensor:
    return torch.copysign((t.abs() + 0.5).floor(), t)


def _half_to_zero(t: Tensor) -> Tensor:
    return torch.copysign((t.abs() - 0.5).ceil(), t)


def _no_minus_zero(v: Tensor, lowest: int, bits: int) -> Tensor:
    return torch.where(v.abs() <= 2.0 ** (lowest - bits - 1), v.abs(), v)


def _back(codes: Tensor) -> Tensor:
    return codes.flatten(-2).roll(-1, -1).unflatten(-1, codes.shape[-2:])


def _of_row(g: Tensor) -> Tensor:
    return _amax(g).amax(-1, keepdim=True).expand(g.shape[:-1])


def _shifted(x: Tensor) -> Tensor:
    return x.roll(1, -1)


RULES: tuple[tuple[str, str, Rule, tuple[torch.dtype, ...]], ...] = tuple(
    (name, what, rule, dtypes or (torch.float32, torch.bfloat16))
    for name, what, rule, dtypes in (
        ("truncated", "codes are cut off instead of rounded", Rule(round=_on_grid(torch.trunc)), ()),
        ("half_away", "ties go away from zero instead of to the even code", Rule(round=_on_grid(_half_away)), ()),
        ("half_up", "ties go up", Rule(round=_on_grid(lambda t: (t + 0.5).floor())), ()),
        ("half_to_zero", "ties go towards zero", Rule(round=_on_grid(_half_to_zero)), ()),
        ("subnormals_flushed", "codes below the smallest normal number are zero", Rule(round=_flushed), ()),
        ("scale_down", "scales are rounded down and large values clamped", Rule(exponent=_down), ()),
        ("scale_nearest", "scales are rounded to the nearest power of two", Rule(exponent=_nearest), ()),
        ("scale_always_next", "an exact power of two takes the next scale", Rule(exponent=_always_next), ()),
        ("scale_by_log", "exponents are ceilings of fp32 logarithms", Rule(exponent=_by_log), _FULL),
        ("amax_signed", "the largest value is taken instead of the largest magnitude", Rule(amax=lambda g: g.amax(-1)), ()),
        ("amax_of_row", "a whole row shares one scale", Rule(amax=_of_row), ()),
        ("amax_of_next_row", "each row takes the scales of the next one", Rule(amax=lambda g: _amax(g).roll(-1, 0)), ()),
        ("amax_bf16", "the largest magnitude is kept in bf16", Rule(amax=lambda g: _amax(g).bfloat16().float()), _FULL),
        ("amax_rms", "scales come from the root of the mean square", Rule(amax=lambda g: g.square().mean(-1).sqrt()), ()),
        ("groups_shifted", "groups begin one channel later", Rule(before=_shifted, codes=_back), ()),
        ("floor_lost", "the largest magnitude has no floor", Rule(floored=lambda amax, floor: amax), ()),
        ("floor_added", "the floor is added", Rule(floored=lambda amax, floor: amax + floor), ()),
        ("floor_of_other_format", "the floor is that of the other format", Rule(floor=lambda f: 1e-4 if f < 1e-30 else MXFP8_FLOOR), ()),
        ("sign_lost", "codes have no sign", Rule(before=torch.abs), ()),
        ("minus_zero_lost", "negative values that round to zero lose their sign", Rule(round=_no_minus_zero), ()),
        ("exponent_off", "scales are written one exponent too large", Rule(stored=lambda e: e + 1), ()),
        ("scale_inverted", "the inverse scale is written", Rule(stored=lambda e: -e), ()),
        ("half_groups", "scales come from the first half of each group", Rule(amax=lambda g: _amax(g[..., : g.shape[-1] // 2])), ()),
        ("last_of_group_lost", "the last channel of a group does not count for its scale", Rule(amax=lambda g: _amax(g[..., :-1])), ()),
        ("through_bf16", "values are rounded to bf16 before they are quantised", Rule(before=lambda x: x.bfloat16().float()), _FULL),
    )
)  # fmt: skip
"""Faults of any quantiser: name, description, rule, types for which it shows."""
for _op in (*_FP8, *_FP4):
    for _name, _what, _rule, _dtypes in RULES:
        if not (_op.startswith("roundtrip") and _name == "through_bf16"):  # a generic mutant has the name
            mutant(_op, _name, _what, dtypes=_dtypes)(ruled(_op, _rule))


def _fnuz(v: Tensor) -> Tensor:
    return v.clamp(-240, 240).to(torch.float8_e4m3fnuz).view(torch.uint8)


for _op in _FP8:
    mutant(_op, "largest_240", "codes saturate at 240, the largest of the other FP8 format")(
        ruled(_op, Rule(round=lambda v, lowest, bits: v.clamp(-240, 240)))
    )
    mutant(_op, "fnuz", "codes are written in the other FP8 format")(ruled(_op, Rule(fp8=_fnuz)))
    mutant(_op, "nan_beyond", "scales are rounded down and values beyond the largest code become NaN")(
        ruled(_op, Rule(exponent=_down, fp8=lambda v: v.to(torch.float8_e4m3fn).view(torch.uint8)))
    )
    mutant(_op, "by_448_256", "scales map the largest magnitude to 256 instead of 448")(
        ruled(_op, Rule(exponent=lambda amax, largest: power_of_two_exponent(amax, 256.0)))
    )
for _op in _FP4:
    mutant(_op, "largest_4", "codes saturate at 4")(ruled(_op, Rule(round=lambda v, lowest, bits: v.clamp(-4, 4))))
    mutant(_op, "by_8", "scales map the largest magnitude to 8 instead of 6")(
        ruled(_op, Rule(exponent=lambda amax, largest: power_of_two_exponent(amax, 8.0)))
    )
    mutant(_op, "codes_int4", "codes are integers in two's complement")(
        ruled(_op, Rule(fp4=lambda v: (v.round().to(torch.int32) & 15).to(torch.uint8)))
    )
mutant("quant_mxfp4", "nibbles_swapped", "the first channel of a pair is in the high nibble")(
    ruled("quant_mxfp4", Rule(), lambda c: c[..., 1::2] | (c[..., 0::2] << 4))
)
mutant("quant_mxfp4", "nibbles_apart", "low nibbles hold the first half of a row, high ones the second")(
    ruled("quant_mxfp4", Rule(), lambda c: c[..., : c.shape[-1] // 2] | (c[..., c.shape[-1] // 2 :] << 4))
)
mutant("quant_mxfp4", "sign_in_low_bit", "the sign is the lowest bit of a code")(
    ruled("quant_mxfp4", Rule(codes=lambda c: ((c << 1) & 15) | (c >> 3)))
)
mutant("quant_fp8", "tail_with_group_before", "a short last group takes the scale of the one before")(
    ruled("quant_fp8", Rule(amax=lambda g: _amax(g)[:, [min(i, max(g.shape[1] - 2, 0)) for i in range(g.shape[1])]]))
)
mutant("quant_fp8", "group_ignored", "groups are 32 wide, whatever is asked for")(ruled("quant_fp8", Rule(group=lambda n: 32)))
for _op in _QUANTISERS:

    @mutant(_op, "scales_by_columns", "scales lie group by group instead of row by row")
    def _by_columns(call: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        codes, scale = call(*args, **kwargs)
        return codes, scale.view(torch.uint8).T.reshape(scale.shape).view(torch.float8_e8m0fnu)


@mutant("roundtrip_fp8", "rest_too", "all channels make the round trip, not only the first")
def _rest_too(call: Any, x: Tensor, *, group: int = 64, channels: int) -> Tensor:
    return call(x, group=group, channels=x.shape[-1] // group * group)


@mutant("roundtrip_fp8", "rest_lost", "channels that make no round trip are left at zero")
def _rest_lost(call: Any, x: Tensor, *, group: int = 64, channels: int) -> Tensor:
    return torch.cat((call(x, group=group, channels=channels)[..., :channels], x[..., channels:] * 0), -1)


@mutant("roundtrip_fp8", "last_channels", "the last channels make the round trip instead of the first")
def _last_channels(call: Any, x: Tensor, *, group: int = 64, channels: int) -> Tensor:
    return call(x.roll(channels, -1), group=group, channels=channels).roll(-channels, -1)


# ---- legal ----------------------------------------------------------------------------------------------------------


def _by_bits(amax: Tensor, largest: float) -> Tensor:
    """Exponent from the bits of fp32 numbers; amax is at least a normal number where this is used."""
    bits, limit = amax.contiguous().view(torch.int32), torch.tensor(largest).view(torch.int32)
    return (bits >> 23) - (limit >> 23) + ((bits & 0x7FFFFF) > (limit & 0x7FFFFF)).int()


def _divided(g: Tensor, exponent: Tensor) -> Tensor:
    return g / torch.ldexp(torch.ones(exponent.shape), exponent)[..., None]


def _multiplied(g: Tensor, exponent: Tensor) -> Tensor:
    return g * torch.ldexp(torch.ones(exponent.shape), -exponent)[..., None]


def _nearest_code(v: Tensor) -> Tensor:
    distance = (v.abs().clamp(max=6)[..., None] - fp4_values(torch.arange(8))).abs()
    # even codes first, so that argmin takes them in a tie
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return order[distance[..., order].argmin(-1)].to(torch.uint8) | (torch.signbit(v).to(torch.uint8) << 3)


_BASE = Rule()
for _op in (*_FP8, *_FP4):
    legal(_op, "exponent_by_bits", "exponents from the bits of fp32 numbers")(ruled(_op, replace(_BASE, exponent=_by_bits)))
    legal(_op, "divided", "values divided by their scale")(ruled(_op, Rule(scaled=_divided)))
    legal(_op, "multiplied", "values multiplied by the inverse of their scale")(ruled(_op, Rule(scaled=_multiplied)))
    legal(_op, "rounded_by_hand", "values rounded to the grid before they are encoded")(
        ruled(_op, Rule(round=_on_grid(torch.round)))
    )
for _op in _FP4:
    legal(_op, "by_distance", "the nearest value of the table")(ruled(_op, Rule(fp4=_nearest_code)))
for _op in _FP8:
    legal(_op, "not_clamped", "no clamp: scales are rounded up, so that nothing lies beyond the largest code")(
        ruled(_op, Rule(fp8=lambda v: v.to(torch.float8_e4m3fn).view(torch.uint8)))
    )
