"""RMS norms in torch, fp32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.norm import add_rms_norm, rms_norm, unit_rms_norm

_norm = torch.nn.functional.rms_norm


@rms_norm.implement("cpu")
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        return _norm(x, x.shape[-1:], weight, eps)
    return _norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


@unit_rms_norm.implement("cpu")
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    return _norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


@add_rms_norm.implement("cpu")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return _norm(total, x.shape[-1:], weight.float(), eps).to(x.dtype), total.to(x.dtype)
