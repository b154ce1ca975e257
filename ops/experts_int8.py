"""Grouped experts with INT8 weights, a scale per output channel, and INT8 activations, a scale per row.

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E], w13 [E, 2I, D], s13 [E, 2I], w2 [E, D, I], s2 [E, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops.contract import Contract, Cost, Sample, WrongInput
from ops.experts_math import Weight, check_rows, experts_bound, experts_cost, experts_reference
from ops.experts_samples import CASES, hard_samples, row_errors, sample_dense, sample_rows
from ops.quant import dequant_int8, quant_int8

_OP = "grouped_experts_int8"
_SCALES = (torch.bfloat16, torch.float32)


def _int8(weight: Tensor, scale: Tensor) -> Weight:
    return lambda expert, dtype: weight[expert].to(dtype) * scale[expert].to(dtype)[:, None]


def roundtrip_rows(x_AK: Tensor, compute: torch.dtype) -> Tensor:
    """x quantised to INT8 with one scale per row and back, in `compute` precision (the rule of quant_int8)."""
    return dequant_int8.reference(*quant_int8.reference(x_AK), dtype=compute, compute=compute)


def _interval(h: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """INT8 round trip of h per row, how far that of any value within h +- error may lie from it, and the relative error of a row's scale."""

    def trip(value: Tensor, amax: Tensor) -> Tensor:
        scale = amax.clamp_min(0) / 127
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        return (value / safe).round().clamp(-127, 127) * scale

    if not h.shape[1]:
        return h, error, 0.0
    largest, at = h.abs().max(-1, keepdim=True)
    exact = trip(h, largest)
    reach = torch.zeros_like(h)
    for amax in ((h.abs() - error).amax(-1, keepdim=True), (h.abs() + error).amax(-1, keepdim=True)):
        for value in (h - error, h, h + error):
            reach = torch.maximum(reach, (trip(value, amax) - exact).abs())
    return exact, reach, error.gather(-1, at) / largest.clamp_min(torch.finfo(torch.float64).tiny)


def _grouped_experts_int8(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """grouped_experts over INT8 weights, w = code * scale[channel]; integer products sum exactly.

    rows_AD [A, D] any float type; row_weight_A fp32 [A]; counts_E int64 [E]; w13 int8 [E, 2I, D], s13 bf16 or fp32 [E, 2I];
    w2 int8 [E, D, I], s2 bf16 or fp32 [E, D]. quantize: rows and the weighted activation are rounded to INT8 per row (quant_int8)
    before the products; the codes do not depend on the row weight. Returns [A, D] in rows' type.
    Source: npu_grouped_matmul and npu_dequant_swiglu_quant (Ascend operator notes, section 9). ValueError for shapes, types and
    counts that do not fit.
    """
    kwargs: dict[str, Any] = {"limit": limit, "quantize": quantize, "compute": compute, "trip": roundtrip_rows}
    return experts_reference(rows_AD, row_weight_A, counts_E, _int8(w13, s13), _int8(w2, s2), **kwargs)


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], expected: tuple[int, ...]) -> None:
    if tensor.shape != expected or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{_OP}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted} {expected}")


def _meta(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    width = rows_AD.shape[-1]
    if w13.dim() != 3 or w13.shape[1] % 2:
        raise ValueError(f"{_OP}: w13 has shape {tuple(w13.shape)}, expected [E, 2I, {width}]")
    experts, inner = w13.shape[0], w13.shape[1] // 2
    check_rows(_OP, rows_AD, row_weight_A, counts_E, experts, limit)
    _check("w13", w13, (torch.int8,), (experts, 2 * inner, width))
    _check("w2", w2, (torch.int8,), (experts, width, inner))
    _check("s13", s13, _SCALES, (experts, 2 * inner))
    _check("s2", s2, _SCALES, (experts, width))
    return torch.empty(rows_AD.shape, dtype=rows_AD.dtype, device="meta")


def pack_int8(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Experts' dense weights quantised per output channel: int8 [E, N, K] and scales [E, N] that bf16 holds exactly."""
    scale = (weight_ENK.abs().amax(-1) / 127).bfloat16()
    wide = scale.float()
    safe = torch.where(wide > 0, wide, torch.ones_like(wide))
    return (weight_ENK / safe[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def _weights(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *pack_int8(w13), *pack_int8(w2)


def _outliers(g: torch.Generator, counts: list[int], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Rows and activations with one channel so large that the codes of all others are 0, and hardly read: rounding is what is seen."""
    width, inner = 256, 256
    x, weight, counts_E = sample_rows(g, counts, width, torch.float32)
    w13, w2 = sample_dense(g, len(counts), width, inner, 0.3)
    x[:, 0] = 512.0
    w13[:, :, 0] = w13.abs().amax(-1) / 127
    for row in (0, inner):
        w13[:, row] = 0
        w13[:, row, 0] = 0.1
    w2[:, :, 0] = w2.abs().amax(-1) / 127
    return (x.to(dtype), weight, counts_E), w13, w2


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    cases = {**CASES, "flash": ([2, 0, 1], 4096, 256, 3.0, 10.0)}
    for name, (counts, width, inner, spread, limit) in cases.items():
        rows = sample_rows(g, counts, width, dtype)
        q13, s13, q2, s2 = _weights(*sample_dense(g, len(counts), width, inner, spread))
        if name in ("many", "odd"):
            s13 = s13.float()
        yield Sample(name, (*rows, q13, s13, q2, s2), {"limit": limit}, (name,))
        if name in ("clamp", "many", "narrow-limit"):
            yield Sample(f"{name}-plain", (*rows, q13, s13, q2, s2), {"limit": limit, "quantize": False}, (name,))
    yield from (s for s in hard_samples(g, dtype, _weights) if s.name != "outliers")
    rows, w13, w2 = _outliers(g, [2, 0, 3], dtype)
    yield Sample("outliers", (*rows, *_weights(w13, w2)), {"limit": 10.0}, ("outliers",))
    (x, weight, counts_E), (w13, w2) = sample_rows(g, [3, 0, 2], 256, dtype), sample_dense(g, 3, 256, 128, 1.0)
    # a scale that two rows share leaves the small one hardly a code
    x[::2] /= 64
    yield Sample("uneven", (x, weight, counts_E, *_weights(w13, w2)), {"limit": 10.0}, ("uneven",))


def _errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    g = torch.Generator().manual_seed(0)
    rows = sample_rows(g, [2, 1], 24, dtype)
    w13, s13, w2, s2 = _weights(*sample_dense(g, 2, 24, 8, 1.0))
    kwargs: dict[str, Any] = {"limit": 10.0}
    yield from row_errors(rows, (w13, s13, w2, s2), kwargs)
    yield WrongInput("w13-type", (*rows, w13.float(), s13, w2, s2), kwargs, r"w13 is torch.float32 .*expected torch.int8")
    yield WrongInput("w13-rows", (*rows, w13[:, :15], s13, w2, s2), kwargs, r"w13 has shape \(2, 15, 24\)")
    yield WrongInput("w2-shape", (*rows, w13, s13, w2[:, :, :4], s2), kwargs, r"w2 is .*\(2, 24, 4\), expected .*\(2, 24, 8\)")
    yield WrongInput("s13-shape", (*rows, w13, s13[:, :1], w2, s2), kwargs, r"s13 is .*\(2, 1\), expected .*\(2, 16\)")
    yield WrongInput("s2-type", (*rows, w13, s13, w2, s2.double()), kwargs, r"s2 is torch.float64")


def _bound(*args: Tensor, limit: float, quantize: bool = True, golden: Any, found: Any) -> tuple[Tensor]:
    rows_AD, row_weight_A, counts_E, w13, s13, w2, s2 = args
    weights = _int8(w13, s13), _int8(w2, s2)
    trips: dict[str, Any] = {"trip": roundtrip_rows, "interval": _interval}
    return (experts_bound(rows_AD, row_weight_A, counts_E, *weights, limit=limit, quantize=quantize, **trips),)


def _cost(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Cost:
    return experts_cost(rows_AD, row_weight_A, counts_E, w13.shape[1] // 2, (w13, s13, w2, s2), "int8")


grouped_experts_int8 = Contract(
    name=_OP,
    reference=_grouped_experts_int8,
    meta=_meta,
    samples=_samples,
    errors=_errors,
    bound=_bound,
    cost=_cost,
    rms_share=1.0,  # where one code alone is uncertain, its flip takes the whole bound of a row
)
