"""Sample inputs and wrong inputs that grouped experts share, whatever the storage format of their weights.

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E], w13 [E, 2I, D], w2 [E, D, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops.contract import Sample, WrongInput

CASES: dict[str, tuple[list[int], int, int, float, float]] = {  # counts, D, I, spread of gate and up, limit
    "zero": ([0, 0, 0], 16, 8, 2.0, 10.0),
    "one": ([0, 1, 0], 16, 8, 2.0, 10.0),
    "odd": ([2, 0, 3, 1], 19, 7, 2.0, 10.0),
    "all-on-one": ([0, 0, 9, 0], 24, 12, 2.0, 10.0),
    "clamp": ([3, 2], 48, 40, 9.0, 10.0),
    "narrow-limit": ([4, 0, 2], 32, 24, 1.0, 0.6),
    "many": ([17, 33, 0, 5], 64, 48, 3.0, 10.0),
    "wide-in": ([1, 0, 1], 4096, 64, 3.0, 10.0),
    "wide-inner": ([2, 0], 64, 2048, 3.0, 10.0),
}


FP4_CASES: dict[str, tuple[list[int], int, int, float, float]] = {
    "zero": ([0, 0], 32, 32, 2.0, 10.0),
    "one": ([0, 1, 0], 32, 64, 2.0, 10.0),
    "odd": ([2, 0, 3, 1], 160, 96, 2.0, 10.0),
    "all-on-one": ([0, 7], 64, 32, 2.0, 10.0),
    "clamp": ([3, 2], 128, 160, 9.0, 10.0),
    "wide-in": ([1, 0], 4096, 32, 3.0, 10.0),
    "wide-inner": ([0, 2], 64, 2048, 3.0, 10.0),
    "many": ([9, 0, 17, 6], 96, 64, 2.0, 10.0),
    "narrow-limit": ([4, 0, 2], 32, 64, 1.0, 0.6),
}


def sample_rows(g: torch.Generator, counts: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows, row weights and the counts tensor of one sample."""
    total = sum(counts)
    return torch.randn(total, width, generator=g).to(dtype), 1.5 * torch.rand(total, generator=g), torch.tensor(counts)


def sample_dense(g: torch.Generator, experts: int, width: int, inner: int, spread: float) -> tuple[Tensor, Tensor]:
    """Random fp32 w13 and w2 that give gate and up the standard deviation `spread`."""
    w13 = torch.randn(experts, 2 * inner, width, generator=g) * spread * width**-0.5
    return w13, torch.randn(experts, width, inner, generator=g) * inner**-0.5


def sample_one_sided(
    g: torch.Generator, counts: list[int], width: int, inner: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Rows, w13 and w2 (fp32) that are positive throughout: sums grow with every term, so that a coarse accumulator shows."""
    x, weight, counts_E = sample_rows(g, counts, width, dtype)
    w13, w2 = sample_dense(g, len(counts), width, inner, 1.0)
    strength = 0.3 + 2 * torch.rand(len(counts), 2 * inner, 1, generator=g)
    return (x.abs(), weight, counts_E), w13.abs() * strength * width**-0.5, w2.abs() * inner**-0.5


def sample_outliers(
    g: torch.Generator, counts: list[int], dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Rows, w13 and w2 (fp32) whose first channels are far larger than the rest of their group of 128, and hardly read again.

    The rest of the group falls to zero beside them, but not in a kernel that has smaller groups or does not round at all.
    """
    width, inner = 256, 256
    x, weight, counts_E = sample_rows(g, counts, width, torch.float32)
    w13, w2 = sample_dense(g, len(counts), width, inner, 2.0**-7)
    x[:, 0] = min(2.0**17, torch.finfo(dtype).max)
    w13[:, :, 0] *= 2.0**-24
    for first in (0, inner):
        w13[:, first : first + 32] *= 2.0**10
    w2[:, :, :32] *= 2.0**-20
    return (x.to(dtype), weight, counts_E), w13, w2


ONE_SIDED = {"one-sided-in": ([1, 0, 2], 4096, 32), "one-sided-inner": ([2, 1], 64, 2048)}
"""Counts, D and I of samples that `sample_one_sided` makes."""


def hard_samples(
    g: torch.Generator, dtype: torch.dtype, pack: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> Iterator[Sample]:
    """One-sided and outlying inputs of experts over stored weights, which `pack` makes of w13 and w2."""
    for name, (counts, width, inner) in ONE_SIDED.items():
        rows, w13, w2 = sample_one_sided(g, counts, width, inner, dtype)
        weights = pack(w13, w2)
        yield Sample(name, (*rows, *weights), {"limit": 10.0}, ("one-sided",))
        yield Sample(f"{name}-plain", (*rows, *weights), {"limit": 10.0, "quantize": False}, ("one-sided",))
    rows, w13, w2 = sample_outliers(g, [2, 0, 3], dtype)
    yield Sample("outliers", (*rows, *pack(w13, w2)), {"limit": 10.0}, ("outliers",))


def row_errors(rows: tuple[Tensor, Tensor, Tensor], rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[WrongInput]:
    """Wrong rows, weights, counts and limits, for every storage format."""
    x, weight, counts = rows
    yield WrongInput("rows-integer", (x.int(), weight, counts, *rest), kwargs, r"rows are torch.int32")
    yield WrongInput("weight-length", (x, weight[:1], counts, *rest), kwargs, r"row_weight is torch.float32 \(1,\)")
    yield WrongInput("counts-type", (x, weight, counts.int(), *rest), kwargs, r"counts is torch.int32")
    yield WrongInput("counts-length", (x, weight, counts[:1], *rest), kwargs, r"counts is torch.int64 \(1,\)")
    yield WrongInput("counts-sum", (x, weight, counts + 1, *rest), kwargs, r"counts add up to \d+, expected \d+")
    yield WrongInput("limit", (x, weight, counts, *rest), {**kwargs, "limit": -1.0}, r"limit is -1.0")
