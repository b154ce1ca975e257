"""RMS norms through npu_rms_norm, which accumulates in fp32 and rounds once.

Shapes as in ops/norm.py. Source: Ascend operator notes, section 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ops.norm import rms_norm, unit_rms_norm

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RMS_NORM = "npu::npu_rms_norm"


@functools.lru_cache(maxsize=16)
def ones(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight of ones [width], made once: the vendor's op has no form without a weight."""
    return torch.ones(width, dtype=dtype, device=device)


@rms_norm.implement(
    "ascend",
    name="npu_rms_norm",
    dtypes=FLOATS,
    needs=(RMS_NORM,),
    when=lambda x, weight, *, eps: weight.dtype == x.dtype and x.is_contiguous(),
)
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y: Tensor = torch.ops.npu.npu_rms_norm(input=x, gamma=weight, epsilon=eps)[0]
    return y


@unit_rms_norm.implement("ascend", name="npu_rms_norm", dtypes=FLOATS, needs=(RMS_NORM,), when=lambda x, *, eps: x.is_contiguous())
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    y: Tensor = torch.ops.npu.npu_rms_norm(input=x, gamma=ones(x.shape[-1], x.dtype, x.device), epsilon=eps)[0]
    return y
