"""Arithmetic, error bound and checks that grouped experts share, whatever the storage format of their weights.

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E], gate_up [A, 2I], h [A, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Cost, tensors_bytes
from ops.quant import dequant_fp8, quant_fp8
from ops.swiglu import activation, check_limit, subnormal, swiglu_error

ACTIVATION_GROUP = 128
_FP8_MAX, _AMAX_FLOOR = 448.0, 1e-4
Weight: TypeAlias = Callable[[int, torch.dtype], Tensor]  # (expert, type) -> dense matrix
Trip: TypeAlias = Callable[[Tensor, torch.dtype], Tensor]  # (activations, type) -> quantised and back
# (values, errors) -> round trip, how far off each element may be, and by which share all elements of a row may be off together
Interval: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | float]]


def segments(counts_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of the experts that received rows."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, start, start + count
        start += count


def roundtrip_activation(x_AK: Tensor, compute: torch.dtype) -> Tensor:
    """x quantised to FP8 per row and 128 channels and back, in `compute` precision (specification section 10.3)."""
    q, scale = quant_fp8.reference(x_AK, group=ACTIVATION_GROUP, compute=compute)
    return dequant_fp8.reference(q, scale, group=ACTIVATION_GROUP, dtype=compute, compute=compute)


def experts_reference(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Weight,
    w2: Weight,
    *,
    limit: float,
    quantize: bool,
    compute: torch.dtype,
    trip: Trip = roundtrip_activation,
) -> Tensor:
    """w2(swiglu(w13 x) * row_weight) of each row by its expert; with `quantize` both products take activations rounded by `trip` (FP8)."""
    x_AD = trip(rows_AD, compute) if quantize else rows_AD.to(compute)
    y_AD = torch.zeros(rows_AD.shape, dtype=compute)
    for e, i, j in segments(counts_E):
        h = activation(x_AD[i:j] @ w13(e, compute).T, limit) * row_weight_A[i:j].to(compute)[:, None]
        y_AD[i:j] = (trip(h, compute) if quantize else h) @ w2(e, compute).T
    return y_AD


def fp8_interval(
    h: Tensor, error: Tensor, *, group: int = ACTIVATION_GROUP, floor: float = _AMAX_FLOOR
) -> tuple[Tensor, Tensor, float]:
    """FP8 round trip of h per `group` channels, and how far that of any value within h +- error may lie from it."""
    rows, width = h.shape
    pad = -width % group
    h, error = (torch.nn.functional.pad(t, (0, pad)).reshape(rows, -1, group) for t in (h, error))

    def scale_of(amax: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(amax.clamp_min(floor) / _FP8_MAX)
        return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).to(exponent.dtype))

    def trip(value: Tensor, scale: Tensor) -> Tensor:
        return (value / scale).clamp(-_FP8_MAX, _FP8_MAX).float().to(torch.float8_e4m3fn).double() * scale

    exact = trip(h, scale_of(h.abs().amax(-1, keepdim=True)))
    reach = torch.zeros_like(h)
    for amax in ((h.abs() - error).amax(-1, keepdim=True), (h.abs() + error).amax(-1, keepdim=True)):
        for value in (h - error, h, h + error):
            reach = torch.maximum(reach, (trip(value, scale_of(amax)) - exact).abs())
    # scales are powers of two: one that is off is off by a factor of 2, which is in the reach
    return exact.reshape(rows, -1)[:, :width], reach.reshape(rows, -1)[:, :width], 0.0


def experts_bound(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Weight, w2: Weight, *, limit: float, quantize: bool,
    trip: Trip = roundtrip_activation, interval: Interval = fp8_interval,
) -> Tensor:  # fmt: skip
    """Error bound [A, D] of grouped experts whose products accumulate in fp32.

    gate, up and h may be rounded to the rows' type; codes of h may differ where h is uncertain across a rounding
    boundary. Errors of h are independent, so their sum over I is bounded by SPREAD times its root mean square, and by the
    plain sum.
    """
    unit = bounds.roundoff(rows_AD.dtype)
    x_AD = trip(rows_AD, torch.float64) if quantize else rows_AD.double()
    bound_AD = torch.zeros(rows_AD.shape, dtype=torch.float64)
    for e, i, j in segments(counts_E):
        a, b = w13(e, torch.float64), w2(e, torch.float64)
        gate_up = x_AD[i:j] @ a.T
        error = bounds.accumulate(x_AD.shape[1], x_AD[i:j].abs() @ a.abs().T) + unit * gate_up.abs() + subnormal(rows_AD.dtype)
        h, h_error = swiglu_error(gate_up, error, row_weight_A[i:j], limit)
        h_error = h_error + unit * h.abs() + subnormal(rows_AD.dtype)
        together: Tensor | float = 0.0
        if quantize:
            h, h_error, together = interval(h, h_error)
        carried = torch.minimum(h_error @ b.abs().T, bounds.SPREAD * (h_error.square() @ b.square().T).sqrt())
        carried = carried + together * (h @ b.T).abs()
        bound_AD[i:j] = carried + bounds.accumulate(h.shape[1], h.abs() @ b.abs().T) + subnormal(rows_AD.dtype)
    return bound_AD


def check_rows(op: str, rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, experts: int, limit: float) -> None:
    """The checks that all grouped experts share; ValueError names what differs."""
    check_limit(op, limit)
    if not rows_AD.is_floating_point() or rows_AD.dim() != 2:
        raise ValueError(f"{op}: rows are {rows_AD.dtype} {tuple(rows_AD.shape)}, expected a floating type [A, D]")
    count = rows_AD.shape[0]
    if row_weight_A.shape != (count,) or row_weight_A.dtype != torch.float32:
        found = f"{row_weight_A.dtype} {tuple(row_weight_A.shape)}"
        raise ValueError(f"{op}: row_weight is {found}, expected torch.float32 ({count},), one per row")
    if counts_E.shape != (experts,) or counts_E.dtype != torch.int64:
        raise ValueError(f"{op}: counts is {counts_E.dtype} {tuple(counts_E.shape)}, expected torch.int64 ({experts},)")
    if counts_E.device.type == "cpu" and int(counts_E.sum()) != count:
        raise ValueError(f"{op}: counts add up to {int(counts_E.sum())}, expected {count}, the number of rows")


def experts_cost(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, width: int, weights: Sequence[Tensor], rate: str
) -> Cost:
    """Cost of grouped experts of width I = `width`; only experts with rows are read (as many as possible for meta counts)."""
    rows, channels = rows_AD.shape
    experts = counts_E.shape[0]
    read = min(rows, experts) if counts_E.device.type == "meta" else int((counts_E > 0).sum())
    weight_bytes = tensors_bytes(*weights) // max(experts, 1) * read
    fixed = tensors_bytes(rows_AD, row_weight_A, counts_E)
    return Cost(2 * rows * 3 * width * channels, 9 * rows * width, fixed + weight_bytes, tensors_bytes(rows_AD), rate)
