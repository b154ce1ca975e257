"""RMS norms in torch, fp32 inside: one pass for the norm, one or two for the products, in pieces that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.norm import add_rms_norm, rms_norm, unit_rms_norm

PIECE = 1 << 18


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as 1; x fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def piece_rows(x: Tensor) -> int:
    """Rows of the first dimension that hold about PIECE elements, at least one."""
    return max(1, PIECE * x.shape[0] // max(x.numel(), 1))


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm of a piece, fp32 and newly allocated."""
    wide = x.float()
    if x.numel() == x.shape[-1] and x.device.type == "cpu":
        # a single row: its factor as a Python number saves half of the calls, but would wait for any other device
        factor = (float(torch.linalg.vector_norm(wide)) ** 2 / x.shape[-1] + eps) ** -0.5
        return wide * factor if weight is None else (wide * factor).mul_(weight)
    y = wide * inverse_rms(wide, eps)
    return y if weight is None else y.mul_(weight)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.numel() <= PIECE:
        return _normed(x, weight, eps).to(x.dtype)
    y, step = torch.empty_like(x, memory_format=torch.contiguous_format), piece_rows(x)
    for i in range(0, x.shape[0], step):
        y[i : i + step] = _normed(x[i : i + step], weight, eps)
    return y


@rms_norm.implement("cpu")
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return _norm(x, weight, eps)


@unit_rms_norm.implement("cpu")
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    return _norm(x, None, eps)


@add_rms_norm.implement("cpu")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float32:
        total = x + residual
        return _norm(total, weight, eps), total
    wide = x.float().add_(residual)
    return _norm(wide, weight, eps).to(x.dtype), wide.to(x.dtype)
