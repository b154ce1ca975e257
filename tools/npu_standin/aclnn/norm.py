"""Normalisation, rotation and residual streams."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tools.npu_standin.aclnn import ACL_CODES, model, put
from tools.npu_standin.host import bridge

ROTATIONS = {0: "half", 1: "interleave"}


@bridge("aclnnRmsNorm", "x:t gamma:t epsilon:d y:t rstd:t")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    """npu_rms_norm."""
    put(model("npu::npu_rms_norm")(x, gamma, epsilon=epsilon), y, rstd)


@bridge("aclnnRotaryPositionEmbeddingV2", "x:t cos:t sin:t mode:i rotate:t y:t")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: int, rotate: Tensor | None, y: Tensor) -> None:
    """npu_rotary_mul."""
    put(model("npu::npu_rotary_mul")(x, cos, sin, rotary_mode=ROTATIONS[mode], rotate=rotate), y)


@bridge(
    "aclnnMhcPreV2",
    "x:t phi:t alpha:t bias:t gamma:t inner_precise:w norm_eps:d hc_eps:d y:t post:t comb:t inv_rms:t mixes:t pre:t",
)
def mhc_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, gamma: Tensor | None, inner_precise: int, norm_eps: float, hc_eps: float,
    y: Tensor, post: Tensor, comb: Tensor, inv_rms: Tensor | None, mixes: Tensor | None, pre: Tensor | None,
) -> None:  # fmt: skip
    """npu_mhc_pre; the last three outputs exist with out_flag=1 only."""
    results = model("npu::npu_mhc_pre")(
        x,
        phi,
        alpha,
        bias,
        gamma=gamma,
        norm_eps=norm_eps,
        hc_eps=hc_eps,
        out_flag=int(pre is not None),
        inner_precise=inner_precise,
    )
    put(results, y, post, comb, inv_rms, mixes, pre)


@bridge("aclnnMhcSinkhorn", "x:t eps:f num_iters:i y:t norm:t total:t")
def mhc_sinkhorn(x: Tensor, eps: float, num_iters: int, y: Tensor, norm: Tensor | None, total: Tensor | None) -> None:
    """npu_mhc_sinkhorn; eps passes through fp32."""
    put(model("npu::npu_mhc_sinkhorn")(x, eps=eps, num_iters=num_iters, out_flag=int(norm is not None)), y, norm, total)


@bridge("aclnnMhcPost", "x:t h_res:t h_out:t h_post:t y:t")
def mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor, y: Tensor) -> None:
    """npu_mhc_post."""
    put(model("npu::npu_mhc_post")(x, h_res, h_out, h_post), y)


@bridge(
    "aclnnRmsNormDynamicMxQuant",
    "x:t gamma:t beta:t epsilon:d scale_alg:i round_mode:s dst_type:i with_rstd:b y:t scale:t rstd:t",
)
def rms_norm_dynamic_mx_quant(
    x: Tensor, gamma: Tensor, beta: Tensor | None, dst_type: int, with_rstd: bool, y: Tensor, scale: Tensor, rstd: Tensor, **rest: Any
) -> None:  # fmt: skip
    """npu_rms_norm_dynamic_mx_quant; the wheel does not ask for rstd."""
    codes, scales, found = model("npu::npu_rms_norm_dynamic_mx_quant")(x, gamma, beta=beta, dst_type=ACL_CODES + dst_type, **rest)
    put((codes, scales, found if with_rstd else None), y, scale, rstd)
