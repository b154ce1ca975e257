"""Model of this project's own CANN op. T tokens, 4 streams, D channels.

Source: backends/ascend/csrc, whose kernel adds products in fp32 in tiles of channels. The kernel has not been compiled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, require_shape

STREAMS, LANES, WIDEST = 4, 64, 16384


@model("v4_ascend::hc_head")
def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    """[T, D] in the streams' type: sum of the streams, each times sigmoid(u * scale + base) + hc_eps; fp32, one rounding."""
    op = "v4_ascend::hc_head"
    require_dtype(op, "streams", streams, torch.bfloat16, torch.float16, torch.float32)
    require_shape(op, "streams", streams, None, STREAMS, None)
    tokens, _, width = streams.shape
    require(tokens > 0 and width > 0 and width % LANES == 0 and width <= WIDEST, op, f"streams {list(streams.shape)}", "T > 0, D % 64 == 0")
    for name, tensor, shape in (("fn", fn, (STREAMS, STREAMS * width)), ("scale", scale, (1,)), ("base", base, (STREAMS,))):
        require_dtype(op, name, tensor, torch.float32)
        require_shape(op, name, tensor, *shape)
        require(tensor.is_contiguous(), op, f"{name} with strides {tensor.stride()}", "contiguous")
    require(streams.is_contiguous(), op, f"streams with strides {streams.stride()}", "contiguous")
    for name, eps in (("norm_eps", norm_eps), ("hc_eps", hc_eps)):
        require(math.isfinite(eps) and eps >= 0, op, f"{name} {eps}", "finite, not negative")
    x = streams.float()
    flat = x.flatten(1)
    mixes = (flat @ fn.T) / torch.sqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre = 1 / (1 + torch.exp(-(mixes * scale + base))) + hc_eps
    return torch.einsum("tn,tnd->td", pre, x).to(streams.dtype)
