"""Faults and legal variants of INT8 quantisation per token, and of the Hadamard rotation. Shapes: x, codes [T, K]; x [..., n]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import legal, mutant

_FULL = (torch.float32,)
Same = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


# ---- dequant_int8 ---------------------------------------------------------------------------------------------------


def _declare(register: Any, name: str, what: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    @register("dequant_int8", name, what)
    def body(call: Any, q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
        return change(q, scale).to(dtype)


def _by_column(q: Tensor, scale: Tensor) -> Tensor:
    if not len(scale):
        return q.float()
    return q.float() * scale[torch.arange(q.shape[1]) % len(scale)]


_declare(mutant, "unsigned", "codes are read as unsigned", lambda q, s: q.view(torch.uint8).float() * s[:, None])
_declare(mutant, "zero_point", "codes are taken to be centred on -0.5", lambda q, s: (q.float() + 0.5) * s[:, None])
_declare(mutant, "scale_bf16", "scales are kept in bf16", lambda q, s: q.float() * s.bfloat16().float()[:, None])
_declare(mutant, "scale_lost", "codes are not scaled", lambda q, s: q.float())
_declare(mutant, "scale_of_next_row", "each row takes the scale of the next one", lambda q, s: q.float() * s.roll(-1)[:, None])
_declare(mutant, "scale_by_column", "scales are taken to belong to channels", _by_column)
_declare(mutant, "scale_inverted", "codes are divided by their scale", lambda q, s: q.float() / s[:, None])
_declare(mutant, "by_128", "scales are taken for amax instead of amax / 127", lambda q, s: q.float() * s[:, None] / 127)
_declare(mutant, "codes_fp8", "codes pass through FP8", lambda q, s: q.to(torch.float8_e4m3fn).float() * s[:, None])
_declare(legal, "codes_by_table", "codes looked up", lambda q, s: (torch.arange(256) - 128.0)[q.long() + 128] * s[:, None])
_declare(legal, "fp64", "multiplied in float64 and rounded once", lambda q, s: q.double() * s.double()[:, None])


# ---- quant_int8 -----------------------------------------------------------------------------------------------------


def _int8(
    rounding: Same = torch.round,
    amax: Same = lambda x: x.abs().amax(-1),
    divisor: float = 127,
    before: Same = _same,
    zero: float = 0.0,
) -> Any:
    def body(call: Any, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        x = before(x_TK.float())
        scale = amax(x) / divisor
        safe = torch.where(scale > 0, scale, torch.ones(()))
        codes = rounding(x / safe[:, None]).clamp(-128, 127).to(torch.int8)
        return codes, torch.where(scale > 0, scale, torch.full((), zero)) if zero else scale

    return body


def _int8_after(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    return lambda call, x_TK: change(*call(x_TK))


_FAULTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("truncated", "codes are cut off instead of rounded", {"rounding": torch.trunc}),
    ("half_away", "ties go away from zero", {"rounding": lambda t: torch.copysign((t.abs() + 0.5).floor(), t)}),
    ("half_up", "ties go up", {"rounding": lambda t: (t + 0.5).floor()}),
    ("by_128", "scales are amax / 128", {"divisor": 128}),
    ("amax_signed", "the largest value is taken instead of the largest magnitude", {"amax": lambda x: x.amax(-1)}),
    ("amax_of_all", "all tokens share one scale", {"amax": lambda x: x.abs().max().expand(len(x)) if len(x) else x.sum(-1)}),
    ("amax_of_next_row", "each token takes the scale of the next one", {"amax": lambda x: x.abs().amax(-1).roll(-1)}),
    ("last_channel_lost", "the last channel does not count for the scale", {"amax": lambda x: x[:, :-1].abs().amax(-1)}),
    ("zero_row_scale_1", "rows of zeros have a scale of 1", {"zero": 1.0}),
    ("sign_lost", "codes have no sign", {"before": torch.abs}),
)
for _name, _what, _parts in _FAULTS:
    mutant("quant_int8", _name, _what)(_int8(**_parts))
mutant("quant_int8", "amax_bf16", "the largest magnitude is kept in bf16", dtypes=_FULL)(
    _int8(amax=lambda x: x.abs().amax(-1).bfloat16().float())
)
mutant("quant_int8", "through_bf16", "values are rounded to bf16 first", dtypes=_FULL)(
    _int8(before=lambda x: x.bfloat16().float())
)
mutant("quant_int8", "scale_bf16", "scales are stored in bf16")(_int8_after(lambda q, s: (q, s.bfloat16().float())))
mutant("quant_int8", "scale_inverted", "the inverse scale is stored")(_int8_after(lambda q, s: (q, 1 / s)))
mutant("quant_int8", "clamped_126", "codes saturate at 126")(_int8_after(lambda q, s: (q.clamp(-126, 126), s)))
mutant("quant_int8", "zero_point", "codes are stored with 128 added")(_int8_after(lambda q, s: (q ^ -128, s)))


# in bf16 no quotient lies near enough to a half for the two roundings to differ
@mutant("quant_int8", "by_inverse", "values are multiplied by 127 / amax instead of divided by the scale", dtypes=_FULL)
def _by_inverse(call: Any, x_TK: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = x_TK.float(), call(x_TK)[1]
    inverse = torch.where(scale > 0, 127 / x.abs().amax(-1), torch.zeros(()))
    return (x * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale


legal("quant_int8", "amax_by_halves", "the largest magnitude from that of even and of odd channels")(
    _int8(amax=lambda x: torch.maximum(x[:, 0::2].abs().amax(-1), x[:, 1::2].abs().amax(-1)))
)
legal("quant_int8", "rounded_by_adding", "rounded by adding 1.5 * 2^23 and taking it off again")(
    _int8(rounding=lambda t: (t + 12582912.0) - 12582912.0)
)

# ---- hadamard -------------------------------------------------------------------------------------------------------


def _matrix(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def _by_matrix(change: Callable[[Tensor], Tensor] = _same, factor: Callable[[int], float] = lambda n: n**-0.5) -> Any:
    return lambda call, x: ((x.float() @ change(_matrix(x.shape[-1])).T) * factor(x.shape[-1])).to(x.dtype)


def _sequency(h: Tensor) -> Tensor:
    return h[(h.diff(dim=1) != 0).sum(1).argsort()]


def _reversed_bits(h: Tensor) -> Tensor:
    bits = len(h).bit_length() - 1
    return h[torch.tensor([int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(len(h))])]


def _butterflies(store: Same, widest_first: bool = False, skip: int = 0) -> Any:
    """The transform stage by stage, results of a stage passed through `store`; the last `skip` stages are left away."""

    def body(call: Any, x: Tensor) -> Tensor:
        n, y = x.shape[-1], x.float().reshape(-1, x.shape[-1])
        widths = [1 << i for i in range(n.bit_length() - 1)]
        for width in (widths[::-1] if widest_first else widths)[: len(widths) - skip]:
            a, b = y.view(-1, n // (2 * width), 2, width).unbind(2)
            y = store(torch.stack((a + b, a - b), 2).view(-1, n) * 2**-0.5)
        return y.view(x.shape).to(x.dtype)

    return body


def _bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def _across(call: Any, x: Tensor) -> Tensor:
    """Rows instead of channels where there are as many."""
    n = x.shape[-1]
    if x.dim() < 2 or x.shape[-2] < 2:
        return call(x)
    flat = x.reshape(-1, n)
    rows = len(flat) // n * n
    return torch.cat((call(flat[:rows].view(-1, n, n).mT.contiguous()).mT.reshape(-1, n), call(flat[rows:]))).view(x.shape)


mutant("hadamard", "not_normalised", "the factor n^-0.5 is left away")(_by_matrix(factor=lambda n: 1.0))
mutant("hadamard", "normalised_twice", "the factor is 1/n")(_by_matrix(factor=lambda n: 1 / n))
mutant("hadamard", "sequency", "results are ordered by the number of sign changes")(_by_matrix(_sequency))
mutant("hadamard", "reversed_bits", "results are in bit-reversed order")(_by_matrix(_reversed_bits))
mutant("hadamard", "stage_lost", "the widest butterfly is left away")(_butterflies(_same, skip=1))
mutant("hadamard", "stages_bf16", "each stage is stored in bf16")(_butterflies(_bf16))
mutant("hadamard", "difference_swapped", "butterflies subtract the wrong way round")(_by_matrix(lambda h: _swapped(len(h))))
mutant("hadamard", "last_column_negated", "the last channel enters with the wrong sign")(
    _by_matrix(lambda h: torch.cat((h[:, :-1], -h[:, -1:]), 1) if len(h) > 1 else h)
)
mutant("hadamard", "halves", "the two halves of a row are transformed by themselves")(
    lambda call, x: torch.cat([call(part.contiguous()) for part in x.chunk(2, -1)], -1) if x.shape[-1] > 1 else call(x)
)
mutant("hadamard", "identity", "the rotation is left away")(lambda call, x: x.clone())
mutant("hadamard", "squares_transposed", "rows are transformed in place of channels where they fill a square")(_across)


def _swapped(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((-h, h), 1)))
    return h


legal("hadamard", "matrix", "one product with the matrix of signs")(_by_matrix())
legal("hadamard", "widest_first", "stages from the widest to the narrowest, each normalised")(
    _butterflies(_same, widest_first=True)
)
legal("hadamard", "fp64", "computed in float64 and rounded once")(
    lambda call, x: ((x.double() @ _matrix(x.shape[-1]).double().T) * x.shape[-1] ** -0.5).to(x.dtype)
)
