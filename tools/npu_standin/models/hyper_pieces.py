"""The two pieces of npu_hc_pre around its product. Shapes: T tokens, 4 streams, d channels, 24 mixes.

Source: cann-recipes-infer, docs and tests of npu_hc_pre_inv_rms and npu_hc_pre_sinkhorn: fp32, y in bf16, 20 iterations, the mixes are
multiplied by rsqrt inside. The document's table says d = 4096; its test has 7168 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, require_shape

STREAMS, MIXES, ITERATIONS = 4, 24, 20
WIDTHS = (4096, 7168)
_SOCS = ("910_93", "950")


@model("custom::npu_hc_pre_inv_rms", socs=_SOCS)
def npu_hc_pre_inv_rms(x: Tensor, *, epsilon: float = 1e-20) -> Tensor:
    """1 / sqrt(mean of squares over the last two dimensions + epsilon), fp32 [T, 1]."""
    op = "custom::npu_hc_pre_inv_rms"
    require_dtype(op, "x", x, torch.bfloat16, torch.float16, torch.float32)
    require(x.numel() > 0 and x.dim() in (3, 4), op, f"x {list(x.shape)}", "[T, 4, d] or [b, s, 4, d], not empty")
    require(epsilon >= 0, op, f"epsilon {epsilon}", "not negative")
    return torch.rsqrt(x.float().flatten(-2).square().mean(-1, keepdim=True) + epsilon)


@model("custom::npu_hc_pre_sinkhorn", socs=_SOCS)
def npu_hc_pre_sinkhorn(
    mixes: Tensor, rsqrt: Tensor, hc_scale: Tensor, hc_base: Tensor, x: Tensor, hc_mult: int = 4, hc_sinkhorn_iters: int = 20,
    hc_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y bf16 [T, d], post fp32 [T, 4], comb fp32 [T, 4, 4] of mixes [T, 24] times rsqrt [T, 1]."""
    op = "custom::npu_hc_pre_sinkhorn"
    require_shape(op, "x", x, None, STREAMS, None)
    tokens, width = x.shape[0], x.shape[2]
    require(tokens > 0 and width in WIDTHS, op, f"x {list(x.shape)}", f"T > 0 and d in {WIDTHS}")
    require_dtype(op, "x", x, torch.bfloat16)
    shapes = {"mixes": (mixes, (tokens, MIXES)), "rsqrt": (rsqrt, (tokens, 1)), "hc_scale": (hc_scale, (3,)), "hc_base": (hc_base, (MIXES,))}
    for name, (tensor, shape) in shapes.items():
        require_dtype(op, name, tensor, torch.float32)
        require_shape(op, name, tensor, *shape)
        require(tensor.is_contiguous(), op, f"{name} with strides {tensor.stride()}", "contiguous")
    require(hc_mult == STREAMS and hc_sinkhorn_iters == ITERATIONS, op, f"hc_mult {hc_mult}, {hc_sinkhorn_iters} iterations", "4 and 20")
    scaled = mixes * rsqrt
    pre = torch.sigmoid(scaled[:, :4] * hc_scale[0] + hc_base[:4]) + hc_eps
    post = 2 * torch.sigmoid(scaled[:, 4:8] * hc_scale[1] + hc_base[4:8])
    comb = torch.softmax((scaled[:, 8:] * hc_scale[2] + hc_base[8:]).view(tokens, STREAMS, STREAMS), -1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(ITERATIONS - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    return torch.einsum("tn,tnd->td", pre, x.float()).to(x.dtype), post, comb
