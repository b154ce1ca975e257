"""RMSNorm and its fusion with int8 quantisation. Shapes: T tokens, D channels."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, require, require_dtype, require_shape
from tools.npu_standin.models.blocks import mx_quantised
from tools.npu_standin.models.codes import type_of
from tools.npu_standin.models.rounding import int8_per_row

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def normed(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x * rstd * gamma in fp32, and rstd [..., 1]."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * rstd * gamma.float(), rstd


@model("npu::npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y in the type of input [..., D] and rstd fp32 [..., 1]; gamma [D]. Neither Meta nor host checks gamma's length: here it is."""
    require_dtype("npu_rms_norm", "input", input, *FLOATS)
    require_dtype("npu_rms_norm", "gamma", gamma, *FLOATS)
    require(input.dim() >= 1, "npu_rms_norm", "a scalar input", "input [..., D]")
    require_shape("npu_rms_norm", "gamma", gamma, input.shape[-1])
    y, rstd = normed(input, gamma, epsilon)
    return y.to(input.dtype), rstd


@model("custom::npu_rms_norm_dynamic_quant", socs=OLDER)
def npu_rms_norm_dynamic_quant(
    x: Tensor, gamma: Tensor, *, smooth_scale: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """int8 [T, D] and scale fp32 [T] = max|y| / 127 of the normed rows, beta added and smooth_scale multiplied first."""
    op = "npu_rms_norm_dynamic_quant"
    require_dtype(op, "x", x, torch.float16, torch.bfloat16)
    require_shape(op, "x", x, None, None)
    for name, vector in (("gamma", gamma), ("smooth_scale", smooth_scale), ("beta", beta)):
        if vector is not None:
            require_shape(op, name, vector, x.shape[-1])
    y, _ = normed(x, gamma, epsilon)
    y = y if beta is None else y + beta.float()
    return int8_per_row(y if smooth_scale is None else y * smooth_scale.float())


@model("npu::npu_rms_norm_dynamic_mx_quant", socs=("950",))
def npu_rms_norm_dynamic_mx_quant(
    x: Tensor,
    gamma: Tensor,
    *,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    scale_alg: int = 0,
    round_mode: str = "rint",
    dst_type: int = 296,
) -> tuple[Tensor, Tensor, Tensor]:
    """MX codes [.., D] (fp4, the default: uint8 [.., D/2]), scales uint8 [.., ceil(D/64), 2] and rstd fp32 [.., 1] of the normed rows."""
    op = "npu_rms_norm_dynamic_mx_quant"
    require_dtype(op, "x", x, torch.float16, torch.bfloat16)
    require_shape(op, "gamma", gamma, x.shape[-1])
    require(beta is None or beta.shape == gamma.shape, op, "beta of another shape", "beta [D]")
    require(
        scale_alg in (0, 1) and round_mode == "rint", op, f"scale_alg {scale_alg}, round_mode {round_mode!r}", "0 or 1, 'rint'"
    )
    y, rstd = normed(x, gamma, epsilon)
    codes, scales = mx_quantised(y if beta is None else y + beta.float(), type_of(dst_type), round_up=scale_alg == 1)
    return codes, scales.view(torch.uint8), rstd
