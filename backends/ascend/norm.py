"""RMS norms through npu_rms_norm, which accumulates in fp32 and rounds once, and through the ops that quantise the normed row too.

Shapes as in ops/norm.py and ops/norm_quant.py. Source: Ascend operator notes, section 3; cann-recipes-infer, npu_rms_norm_dynamic_quant; ops-nn,
aclnnRmsNormDynamicMxQuant.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backends.ascend.mx import E4M3, flat_scales
from ops.norm import rms_norm, unit_rms_norm
from ops.norm_quant import rms_norm_quant

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RMS_NORM = "npu::npu_rms_norm"
NORM_INT8, NORM_MX = "custom::npu_rms_norm_dynamic_quant", "npu::npu_rms_norm_dynamic_mx_quant"


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


def _quantised_when(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> bool:
    return x_TK.shape[0] > 0 and x_TK.is_contiguous() and weight_K.dtype == x_TK.dtype


def _int8_when(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> bool:
    return kind == "int8" and _quantised_when(x_TK, weight_K, eps=eps, kind=kind)


@rms_norm_quant.implement(
    "ascend",
    name="npu_rms_norm_dynamic_quant",
    dtypes=FLOATS[:2],
    soc=("910b", "910_93"),
    needs=(NORM_INT8,),
    when=_int8_when,
)
def _rms_norm_int8(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    codes, scale = torch.ops.custom.npu_rms_norm_dynamic_quant(x=x_TK, gamma=weight_K, smooth_scale=None, beta=None, epsilon=eps)
    return codes, scale


def _mx_when(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> bool:
    return kind == "mx" and x_TK.shape[1] % 64 == 0 and _quantised_when(x_TK, weight_K, eps=eps, kind=kind)


@rms_norm_quant.implement("ascend", name="npu_rms_norm_dynamic_mx_quant", dtypes=FLOATS[:2], soc=("950",), needs=(NORM_MX,), when=_mx_when)
def _rms_norm_mx(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    codes, scale, _ = torch.ops.npu.npu_rms_norm_dynamic_mx_quant(
        x=x_TK, gamma=weight_K, beta=None, epsilon=eps, scale_alg=1, round_mode="rint", dst_type=E4M3
    )
    return codes, flat_scales(scale)
