"""Rotary embedding of the last channels in interleaved pairs, its inverse, and the fused query norm + rotation.

Shapes: x [T, C] or [T, H, C]; cos, sin [T, R2] with R2 rotary pairs; the last 2*R2 channels are rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.norm import rms_norm


def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False, compute: torch.dtype = torch.float32) -> Tensor:
    """Rotate pair i = channels (C-2*R2+2i, +1) of token t: (a, b) -> (a cos - b sin, a sin + b cos); inverse: with -sin.

    x [T, C] or [T, H, C] any float type (one table row per token, shared by its heads); cos, sin fp32 [T, R2]. Returns a new
    tensor like x; the other channels are copied. fp32 inside, one rounding. Source: specification section 4.1. ValueError for
    tables of another length or wider than C.
    """
    pairs = cos_TR2.shape[1]
    plain = x.shape[-1] - 2 * pairs
    cos, sin = (t.to(compute).view(t.shape[0], *[1] * (x.dim() - 2), pairs) for t in (cos_TR2, sin_TR2))
    if inverse:
        sin = -sin
    xc = x.to(compute)
    a, b = xc[..., plain::2], xc[..., plain + 1 :: 2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((xc[..., :plain], turned), dim=-1)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not x.is_floating_point() or x.dim() not in (2, 3):
        raise ValueError(f"{op}: x is {x.dtype} {tuple(x.shape)}, expected a float tensor [T, C] or [T, H, C]")
    if cos.dim() != 2 or cos.shape[0] != x.shape[0] or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"{op}: cos has shape {tuple(cos.shape)}, expected ({x.shape[0]}, R2) with 2*R2 <= {x.shape[-1]}")
    if sin.shape != cos.shape or {cos.dtype, sin.dtype} != {torch.float32}:
        found = f"cos is {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}"
        raise ValueError(f"{op}: {found}; expected equal shapes in fp32")


def _meta(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    _check("rope", x, cos_TR2, sin_TR2)
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "zero": ((0, 64), 8),
    "one": ((1, 512), 32),
    "odd": ((5, 3, 23), 4),
    "heads": ((3, 4, 128), 32),
    "all": ((4, 16), 8),
    "none": ((2, 6), 0),
    "flash": ((2, 64, 512), 32),
}
_SCALES = {"unit": 1.0, "tiny": 2e-3, "huge": 1e4}


def _tensors(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor, tuple[str, ...]]]:
    g = torch.Generator().manual_seed(seed)
    for shape_name, (shape, pairs) in _SHAPES.items():
        for scale_name, scale in _SCALES.items():
            x = (torch.randn(shape, generator=g) * scale).to(dtype)
            angle = torch.rand(shape[0], pairs, generator=g) * 1e4
            yield f"{shape_name}-{scale_name}", x, angle.cos(), angle.sin(), (shape_name, scale_name)


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, cos, sin, tags in _tensors(dtype, seed):
        yield Sample(name, (x, cos, sin), {}, tags)
        yield Sample(f"{name}-inverse", (x, cos, sin), {"inverse": True}, (*tags, "inverse"))


def _errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, t = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 2)
    yield WrongInput("rows", (x, t[:2], t[:2]), {}, r"cos has shape \(2, 2\), expected \(3, R2\)")
    yield WrongInput("wide", (x, torch.zeros(3, 5), torch.zeros(3, 5)), {}, r"2\*R2 <= 8")
    yield WrongInput("type", (x, t.bfloat16(), t.bfloat16()), {}, r"expected equal shapes in fp32")


def rope_bound(x: Tensor, cos: Tensor, sin: Tensor, error: Tensor | float = 0.0) -> Tensor:
    """Error of a rotation of x (float64) in fp32, whose input errs by `error` elementwise; zero on copied channels."""
    pairs = cos.shape[1]
    u = bounds.roundoff(torch.float32)
    plain = x.shape[-1] - 2 * pairs
    given = torch.as_tensor(error, dtype=torch.float64).expand(x.shape)
    wide = (cos.double().abs() + 0 * sin).view(cos.shape[0], *[1] * (x.dim() - 2), pairs)
    high = sin.double().abs().view(wide.shape)
    a, b = (given + 3 * u * x.abs())[..., plain::2], (given + 3 * u * x.abs())[..., plain + 1 :: 2]
    turned = torch.stack((a * wide + b * high, a * high + b * wide), dim=-1).flatten(-2)
    return torch.cat((given[..., :plain], turned), dim=-1)


rope = Contract(
    name="rope",
    reference=_rope,
    meta=_meta,
    samples=_samples,
    errors=_errors,
    bound=lambda x, cos_TR2, sin_TR2, *, inverse=False, golden, found: (rope_bound(x.double(), cos_TR2, sin_TR2),),
    cost=lambda x, cos_TR2, sin_TR2, *, inverse=False: Cost(
        0, 6 * cos_TR2.numel() * (x.shape[1] if x.dim() == 3 else 1), tensors_bytes(x, cos_TR2, sin_TR2), tensors_bytes(x), "fp32"
    ),
)


def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float, compute: torch.dtype = torch.float32) -> Tensor:
    """Weightless RMS norm of every head, then the rotation of its last 2*R2 channels; fp32 inside.

    q [T, H, C] any float type; cos, sin fp32 [T, R2]. Returns [T, H, C] in q's type. An implementation may round to q's type
    between norm and rotation. Source: specification sections 4 and 4.1. ValueError as for rope.
    """
    xc = q_THC.to(compute)
    return _rope(xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps), cos_TR2, sin_TR2, compute=compute)


def _q_meta(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    _check("q_norm_rope", q_THC, cos_TR2, sin_TR2)
    if q_THC.dim() != 3:
        raise ValueError(f"q_norm_rope: q has shape {tuple(q_THC.shape)}, expected [T, H, C]")
    return torch.empty(q_THC.shape, dtype=q_THC.dtype, device="meta")


def _q_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, cos, sin, tags in _tensors(dtype, seed):
        yield Sample(name, (x if x.dim() == 3 else x[:, None], cos, sin), {"eps": 1e-6}, tags)


def _q_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, t = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 2)
    yield WrongInput("no-heads", (x, t, t), {"eps": 1e-6}, r"expected \[T, H, C\]")
    yield WrongInput("rows", (x[:, None], t[:1], t[:1]), {"eps": 1e-6}, r"cos has shape \(1, 2\), expected \(3, R2\)")


def _q_bound(
    q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float, golden: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> tuple[Tensor]:
    q = q_THC.double()
    normed = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    error = normed.abs() * (bounds.SPREAD * 4 * bounds.roundoff(torch.float32) + bounds.roundoff(q_THC.dtype))
    return (rope_bound(normed, cos_TR2, sin_TR2, error),)


def _compose(ops: SimpleNamespace) -> Any:
    def q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
        return ops.rope(ops.unit_rms_norm(q_THC, eps=eps), cos_TR2, sin_TR2)

    return q_norm_rope


q_norm_rope = Contract(
    name="q_norm_rope",
    reference=_q_norm_rope,
    meta=_q_meta,
    samples=_q_samples,
    errors=_q_errors,
    bound=_q_bound,
    cost=lambda q_THC, cos_TR2, sin_TR2, *, eps: Cost(
        0,
        4 * q_THC.numel() + 6 * cos_TR2.numel() * q_THC.shape[1],
        tensors_bytes(q_THC, cos_TR2, sin_TR2),
        tensors_bytes(q_THC),
        "fp32",
    ),
    compose=_compose,
    parts=("unit_rms_norm", "rope"),
)


def _norm_rope(
    x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float, compute: torch.dtype = torch.float32
) -> Tensor:
    """rms_norm with a weight, then the rotation of the last 2*R2 channels; fp32 inside (the row that every head shares as key and value).

    x [T, C] any float type; weight [C] of that type or fp32; cos, sin fp32 [T, R2]. Returns a new [T, C] in x's type. An implementation may
    round to x's type between norm and rotation. Source: specification sections 4 and 4.1. ValueError as for rope and rms_norm.
    """
    return _rope(rms_norm.reference(x, weight, eps=eps, compute=compute), cos_TR2, sin_TR2, compute=compute)


def _norm_meta(x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    _check("norm_rope", x, cos_TR2, sin_TR2)
    if x.dim() != 2:
        raise ValueError(f"norm_rope: x has shape {tuple(x.shape)}, expected [T, C]")
    return rms_norm.meta(x, weight, eps=eps)


def _norm_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, x, cos, sin, tags in _tensors(dtype, seed):
        row = x if x.dim() == 2 else x[:, 0].contiguous()
        weight = 1 + 0.3 * torch.randn(row.shape[1], generator=g)
        yield Sample(name, (row, weight.to(dtype), cos, sin), {"eps": 1e-6}, tags)


def _norm_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w, t = torch.zeros(3, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.zeros(3, 2)
    yield WrongInput("heads", (x[:, None], w, t, t), {"eps": 1e-6}, r"expected \[T, C\]")
    yield WrongInput("rows", (x, w, t[:1], t[:1]), {"eps": 1e-6}, r"cos has shape \(1, 2\), expected \(3, R2\)")
    yield WrongInput("weight", (x, w[:4], t, t), {"eps": 1e-6}, r"weight has shape \(4,\), expected \(8,\)")


def _norm_bound(
    x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float, golden: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> tuple[Tensor]:
    normed = rms_norm.reference(x, weight, eps=eps, compute=torch.float64)
    error = normed.abs() * (bounds.SPREAD * 4 * bounds.roundoff(torch.float32) + bounds.roundoff(x.dtype))
    return (rope_bound(normed, cos_TR2, sin_TR2, error),)


def _norm_composed(ops: SimpleNamespace) -> Any:
    def norm_rope(x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
        return ops.rope(ops.rms_norm(x, weight, eps=eps), cos_TR2, sin_TR2)

    return norm_rope


norm_rope = Contract(
    name="norm_rope",
    reference=_norm_rope,
    meta=_norm_meta,
    samples=_norm_samples,
    errors=_norm_errors,
    bound=_norm_bound,
    cost=lambda x, weight, cos_TR2, sin_TR2, *, eps: Cost(
        0, 5 * x.numel() + 6 * cos_TR2.numel(), tensors_bytes(x, weight, cos_TR2, sin_TR2), tensors_bytes(x), "fp32"
    ),
    compose=_norm_composed,
    parts=("rms_norm", "rope"),
)
