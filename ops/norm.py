"""RMS norms: weighted, weightless, and with a residual added first.

Shapes: x [..., D], weight [D].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

_SHAPES = {"zero": (0, 64), "one": (1, 64), "odd": (3, 37), "heads": (5, 4, 48), "flash": (2, 4096), "pro": (1, 7168)}
_SCALES = {"unit": 1.0, "tiny": 2e-3, "huge": 1e4}


def _inputs(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor, Tensor, tuple[str, ...]]]:
    g = torch.Generator().manual_seed(seed)
    for shape_name, shape in _SHAPES.items():
        for scale_name, scale in _SCALES.items():
            x = (torch.randn(shape, generator=g) * scale).to(dtype)
            w = (1 + 0.3 * torch.randn(shape[-1], generator=g)).to(dtype)
            yield f"{shape_name}-{scale_name}", x, w, (shape_name, scale_name)
    w = 1 + 0.3 * torch.randn(96, generator=g)
    outliers = torch.randn(3, 96, generator=g)
    outliers[:, ::17] *= 300
    yield "outliers", outliers.to(dtype), w.to(dtype), ("outliers",)
    yield "constant", torch.full((2, 96), 0.75).to(dtype), w.to(dtype), ("constant",)
    yield "zeros", torch.zeros(2, 96, dtype=dtype), w.to(dtype), ("constant",)
    yield "fp32-weight", torch.randn(3, 96, generator=g).to(dtype), w, ("mixed",)


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: x is {x.dtype}, expected a floating type")
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [..., D] with at least two dimensions")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the last dimension of x")


def _norm_bound(golden: Tensor) -> Tensor:
    # mean of squares, rsqrt and two products in fp32: each errs by at most a few u of the result
    return golden.abs() * (bounds.SPREAD * 4 * bounds.roundoff(torch.float32))


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float, compute: torch.dtype = torch.float32) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps); fp32 inside, one rounding at the end.

    x [..., D] any float type; weight [D] same type or fp32. Returns [..., D] in x's type.
    Source: DeepSeek-V4 specification section 2.1. ValueError for a weight of another length.
    """
    xc = x.to(compute)
    return weight.to(compute) * (xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps))


def _rms_norm_meta(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    _check_weight("rms_norm", x, weight)
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _rms_norm_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, w, tags in _inputs(dtype, seed):
        yield Sample(name, (x, w), {"eps": 1e-6}, tags)


def _rms_norm_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x = torch.zeros(2, 8, dtype=dtype)
    yield WrongInput("weight-length", (x, torch.ones(4, dtype=dtype)), {"eps": 1e-6}, r"weight has shape \(4,\), expected \(8,\)")
    yield WrongInput("integer", (x.int(), torch.ones(8)), {"eps": 1e-6}, r"x is torch.int32")


rms_norm = Contract(
    name="rms_norm",
    reference=_rms_norm,
    meta=_rms_norm_meta,
    samples=_rms_norm_samples,
    errors=_rms_norm_errors,
    bound=lambda x, weight, *, eps, golden, found: (_norm_bound(golden[0]),),
    cost=lambda x, weight, *, eps: Cost(0, 4 * x.numel(), tensors_bytes(x, weight), tensors_bytes(x), "fp32"),
)


def _unit_rms_norm(x: Tensor, *, eps: float, compute: torch.dtype = torch.float32) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) over the last dimension, without a weight (the per-head norm of queries).

    x [..., D] any float type; returns [..., D] in x's type, fp32 inside, one rounding. Source: specification section 4.
    ValueError for integer input.
    """
    xc = x.to(compute)
    return xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps)


def _unit_meta(x: Tensor, *, eps: float) -> Tensor:
    _check_weight("unit_rms_norm", x, x.new_empty(x.shape[-1:], device="meta"))
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _unit_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, _, tags in _inputs(dtype, seed):
        yield Sample(name, (x,), {"eps": 1e-6}, tags)


def _unit_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("integer", (torch.zeros(2, 8, dtype=torch.int32),), {"eps": 1e-6}, r"x is torch.int32, expected a float")
    yield WrongInput("vector", (torch.zeros(8, dtype=dtype),), {"eps": 1e-6}, r"x has shape \(8,\), expected \[\.\.\., D\]")


unit_rms_norm = Contract(
    name="unit_rms_norm",
    reference=_unit_rms_norm,
    meta=_unit_meta,
    samples=_unit_samples,
    errors=_unit_errors,
    bound=lambda x, *, eps, golden, found: (_norm_bound(golden[0]),),
    cost=lambda x, *, eps: Cost(0, 3 * x.numel(), tensors_bytes(x), tensors_bytes(x), "fp32"),
)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """s = x + residual (rounded to the storage type), y = rms_norm(s, weight).

    x, residual [..., D] of one float type; weight [D]. Returns y and s, both [..., D] in x's type.
    Source: the fused add and norm of specification section 2.1's RMSNorm. ValueError for differing shapes or types.
    """
    total = x.to(compute) + residual.to(compute)
    return _rms_norm(total, weight, eps=eps, compute=compute), total


def _add_meta(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    _check_weight("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual is {tuple(residual.shape)} {residual.dtype}, expected {tuple(x.shape)} {x.dtype} as x"
        )
    return torch.empty(x.shape, dtype=x.dtype, device="meta"), torch.empty(x.shape, dtype=x.dtype, device="meta")


def _add_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, w, tags in _inputs(dtype, seed):
        residual = x.flip(-1) * 0.75
        yield Sample(name, (x, residual, w), {"eps": 1e-6}, tags)


def _add_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w = torch.zeros(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    yield WrongInput("residual", (x, x[:1], w), {"eps": 1e-6}, r"residual is \(1, 8\)")
    yield WrongInput("weight", (x, x, w[:4]), {"eps": 1e-6}, r"weight has shape \(4,\), expected \(8,\)")


def _add_bound(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, golden: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    # the sum may be rounded to the storage type before it is normed
    u = bounds.roundoff(x.dtype) + 2 * bounds.roundoff(torch.float32)
    return _norm_bound(golden[0]) + 2 * u * golden[0].abs(), 2 * bounds.roundoff(torch.float32) * golden[1].abs()


add_rms_norm = Contract(
    name="add_rms_norm",
    reference=_add_rms_norm,
    meta=_add_meta,
    samples=_add_samples,
    errors=_add_errors,
    bound=_add_bound,
    cost=lambda x, residual, weight, *, eps: Cost(
        0, 5 * x.numel(), tensors_bytes(x, residual, weight), 2 * tensors_bytes(x), "fp32"
    ),
)
