"""Hyper-connections: an fp32 product, then the vendor's ops for norm, coefficients and mixing.

custom.npu_hc_pre does it all in one, but multiplies in HF32 (10 bits of the weights), outside the bound of hc_pre: it is not offered, nor is
cann_ops_transformer.mhc_pre_sinkhorn, whose kernel sets HF32 on A2 and A3. Its two other pieces are: they are documented in fp32, and the product
between them is ours. On 950 the wheel's npu_mhc_pre multiplies in fp32 (inner_precise 0) and leaves the logits of comb to npu_mhc_sinkhorn. The
wheel's npu_mhc_post is not offered: the notes do not say over which index of h_res it sums. No package has hc_head in one kernel; csrc has one of
our own, optional: its torch half has run on a CPU, its kernel has not been compiled.
Source: Ascend operator notes, section 9; cann-recipes-infer, docs and test of npu_hc_pre_sinkhorn and npu_hc_pre_inv_rms; ops-transformer,
aclnnMhcPreV2.md, aclnnMhcPreSinkhorn.md and mhc_pre_sinkhorn_cube_compute.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.hyper import hc_head, hc_post, hc_pre

HC_POST = "custom::npu_hc_post"
INVERSE_RMS, SINKHORN = "custom::npu_hc_pre_inv_rms", "custom::npu_hc_pre_sinkhorn"
MHC_PRE, MHC_SINKHORN = "npu::npu_mhc_pre", "npu::npu_mhc_sinkhorn"
HC_HEAD = "v4_ascend::hc_head"
ITERATIONS = 20
WIDTHS = (4096, 7168)
STREAMS = 4
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HEAD_LANES, HEAD_WIDEST = 64, 16384
_MHC_WIDEST, _IN_FP32 = 16384, 0


def _hc_post_when(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> bool:
    tokens, n, width = streams_TnD.shape
    contiguous = all(t.is_contiguous() for t in (y_TD, streams_TnD, post_Tn, comb_Tnn))
    return tokens > 0 and n == STREAMS and width in WIDTHS and contiguous


@hc_post.implement("ascend", name=HC_POST, dtypes=(torch.bfloat16,), needs=(HC_POST,), when=_hc_post_when)
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    mixed: Tensor = torch.ops.custom.npu_hc_post(x=y_TD, residual=streams_TnD, post=post_Tn, comb=comb_Tnn)
    return mixed


def _hc_pre_when(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> bool:  # fmt: skip
    tokens, n, width = streams_TnD.shape
    contiguous = all(t.is_contiguous() for t in (streams_TnD, scale, base))
    return tokens > 0 and n == STREAMS and width in WIDTHS and iters == ITERATIONS and contiguous


def _mhc_pre_when(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> bool:  # fmt: skip
    tokens, n, width = streams_TnD.shape
    contiguous = all(t.is_contiguous() for t in (streams_TnD, fn, scale, base))
    return tokens > 0 and n == STREAMS and width % 16 == 0 and 0 < width <= _MHC_WIDEST and iters == ITERATIONS and contiguous


@hc_pre.implement(
    "ascend", name="npu_mhc_pre, npu_mhc_sinkhorn", dtypes=FLOATS[:2], soc=("950",), needs=(MHC_PRE, MHC_SINKHORN), when=_mhc_pre_when
)  # fmt: skip
def _mhc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, post, logits_Tnn = torch.ops.npu.npu_mhc_pre(
        x=streams_TnD, phi=fn, alpha=scale, bias=base, gamma=None, norm_eps=norm_eps, hc_eps=hc_eps, out_flag=0, inner_precise=_IN_FP32
    )[:3]
    return x, post, torch.ops.npu.npu_mhc_sinkhorn(x=logits_Tnn, eps=hc_eps, num_iters=iters, out_flag=0)[0]


@hc_pre.implement(
    "ascend",
    name="fp32 product, npu_hc_pre_inv_rms, npu_hc_pre_sinkhorn",
    dtypes=(torch.bfloat16,),
    soc=("910_93", "950"),
    needs=(INVERSE_RMS, SINKHORN),
    when=_hc_pre_when,
)
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, post, comb = torch.ops.custom.npu_hc_pre_sinkhorn(
        mixes=torch.nn.functional.linear(streams_TnD.flatten(1).float(), fn),
        rsqrt=torch.ops.custom.npu_hc_pre_inv_rms(x=streams_TnD, epsilon=norm_eps),
        hc_scale=scale,
        hc_base=base,
        x=streams_TnD,
        hc_mult=STREAMS,
        hc_sinkhorn_iters=iters,
        hc_eps=hc_eps,
    )
    return x, post, comb


def _hc_head_when(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> bool:
    tokens, n, width = streams_TnD.shape
    contiguous = all(t.is_contiguous() for t in (streams_TnD, fn, scale, base))
    return tokens > 0 and n == STREAMS and width % HEAD_LANES == 0 and 0 < width <= HEAD_WIDEST and contiguous


@hc_head.implement("ascend", name=f"{HC_HEAD} (own, optional)", dtypes=FLOATS, needs=(HC_HEAD,), when=_hc_head_when)
def _hc_head(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    collapsed: Tensor = torch.ops.v4_ascend.hc_head(
        streams=streams_TnD, fn=fn, scale=scale, base=base, norm_eps=norm_eps, hc_eps=hc_eps
    )
    return collapsed
