"""Grouped experts with dense weights.

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E], w13 [E, 2I, D] (gate first), w2 [E, D, I].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops.contract import Contract, Sample, WrongInput
from ops.experts_math import Weight, check_rows, experts_bound, experts_cost, experts_reference
from ops.experts_samples import CASES, ONE_SIDED, row_errors, sample_dense, sample_one_sided, sample_rows


def _dense(weight_ENK: Tensor) -> Weight:
    return lambda expert, dtype: weight_ENK[expert].to(dtype)


def _grouped_experts(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """y = w2[e] (silu(min(gate, limit)) * clamp(up, -limit, limit) * row_weight) with gate || up = w13[e] x, e the row's expert.

    rows_AD [A, D] sorted by expert, any float type; row_weight_A fp32 [A], applied before w2; counts_E int64 [E], rows per
    expert, adding up to A; w13 [E, 2I, D] (w1 first, then w3) and w2 [E, D, I], floating, of one type, which may differ from that
    of rows (the wider one computes). Products accumulate in fp32. Returns [A, D] in rows' type.
    Source: DeepSeek-V4 specification section 9. ValueError for shapes, types and counts that do not fit.
    """
    kwargs: dict[str, Any] = {"limit": limit, "quantize": False, "compute": compute}
    return experts_reference(rows_AD, row_weight_A, counts_E, _dense(w13), _dense(w2), **kwargs)


def _grouped_experts_meta(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float
) -> Tensor:
    check_dense_experts("grouped_experts", rows_AD, w13, w2)
    check_rows("grouped_experts", rows_AD, row_weight_A, counts_E, w13.shape[0], limit)
    return torch.empty(rows_AD.shape, dtype=rows_AD.dtype, device="meta")


def check_dense_experts(op: str, x: Tensor, w13: Tensor, w2: Tensor) -> None:
    """Shapes and types of dense expert weights for inputs x [.., D]; ValueError names what differs."""
    if not w13.is_floating_point() or w13.dtype != w2.dtype:
        raise ValueError(f"{op}: w13 is {w13.dtype} and w2 {w2.dtype}, expected one floating type for both")
    if w13.dim() != 3 or w13.shape[1] % 2 or w13.shape[2] != x.shape[-1]:
        raise ValueError(f"{op}: w13 has shape {tuple(w13.shape)}, expected [E, 2I, {x.shape[-1]}], the width of the rows last")
    expected = (w13.shape[0], w13.shape[2], w13.shape[1] // 2)
    if w2.shape != expected:
        raise ValueError(f"{op}: w2 has shape {tuple(w2.shape)}, expected {expected} = [E, D, I] of w13 {tuple(w13.shape)}")


def _grouped_experts_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (counts, width, inner, spread, limit) in CASES.items():
        rows = sample_rows(g, counts, width, dtype)
        w13, w2 = sample_dense(g, len(counts), width, inner, spread)
        yield Sample(name, (*rows, w13.to(dtype), w2.to(dtype)), {"limit": limit}, (name,))
        if name == "odd":
            other = torch.bfloat16 if dtype == torch.float32 else torch.float32
            yield Sample("mixed", (*rows, w13.to(other), w2.to(other)), {"limit": limit}, ("mixed",))
    for name, (counts, width, inner) in ONE_SIDED.items():
        rows, w13, w2 = sample_one_sided(g, counts, width, inner, dtype)
        yield Sample(name, (*rows, w13.to(dtype), w2.to(dtype)), {"limit": 10.0}, ("one-sided",))


def _grouped_experts_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    g = torch.Generator().manual_seed(0)
    rows = sample_rows(g, [2, 1], 8, dtype)
    w13, w2 = (w.to(dtype) for w in sample_dense(g, 2, 8, 4, 1.0))
    kwargs: dict[str, Any] = {"limit": 10.0}
    yield from row_errors(rows, (w13, w2), kwargs)
    yield WrongInput("w13-width", (*rows, w13[:, :, :5], w2), kwargs, r"w13 has shape \(2, 8, 5\), expected \[E, 2I, 8\]")
    yield WrongInput("w2-shape", (*rows, w13, w2[:, :, :3]), kwargs, r"w2 has shape \(2, 8, 3\), expected \(2, 8, 4\)")
    yield WrongInput("w2-type", (*rows, w13, w2.double()), kwargs, r"w2 torch.float64, expected one floating type")


def _grouped_experts_bound(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Tensor]:
    return (experts_bound(rows_AD, row_weight_A, counts_E, _dense(w13), _dense(w2), limit=limit, quantize=False),)


grouped_experts = Contract(
    name="grouped_experts",
    reference=_grouped_experts,
    meta=_grouped_experts_meta,
    samples=_grouped_experts_samples,
    errors=_grouped_experts_errors,
    bound=_grouped_experts_bound,
    cost=lambda rows_AD, row_weight_A, counts_E, w13, w2, *, limit: experts_cost(
        rows_AD, row_weight_A, counts_E, w2.shape[-1], (w13, w2), "bf16"
    ),
)
