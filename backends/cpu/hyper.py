"""Hyper-connections in fp32: one projection, the Sinkhorn matrix kept with tokens innermost so that its steps are long vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu.linear import matmul_nt
from ops.hyper import hc_head, hc_post, hc_pre


def _mixes(streams_TnD: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    x = streams_TnD.float()
    f = x.flatten(1)
    inverse = torch.linalg.vector_norm(f, dim=1, keepdim=True).square_().div_(f.shape[1]).add_(norm_eps).rsqrt_()
    return x, matmul_nt(f, fn).mul_(inverse)


def _sinkhorn(logits_nnT: Tensor, eps: float, iters: int) -> Tensor:
    """Axes (row j, column k, token); the exact sequence of the contract."""
    p = torch.softmax(logits_nnT, dim=1).add_(eps)
    p.div_(p.sum(0, keepdim=True).add_(eps))
    for _ in range(iters - 1):
        p.div_(p.sum(1, keepdim=True).add_(eps))
        p.div_(p.sum(0, keepdim=True).add_(eps))
    return p


@hc_pre.implement("cpu")
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    t, n, _ = streams_TnD.shape
    x, u = _mixes(streams_TnD, fn, norm_eps)
    s0, s1, s2 = scale.unbind()
    pre = torch.addcmul(base[:n], u[:, :n], s0).sigmoid_().add_(hc_eps)
    post = torch.addcmul(base[n : 2 * n], u[:, n : 2 * n], s1).sigmoid_().mul_(2)
    logits = torch.addcmul(base[2 * n :], u[:, 2 * n :], s2)
    comb = _sinkhorn(logits.t().contiguous().view(n, n, t), hc_eps, iters)
    collapsed = torch.bmm(pre[:, None], x).squeeze(1)
    return collapsed.to(streams_TnD.dtype), post, comb.permute(2, 0, 1).contiguous()


@hc_post.implement("cpu")
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    out = post_Tn[:, :, None] * y_TD.float()[:, None]
    return torch.baddbmm(out, comb_Tnn.transpose(1, 2), streams_TnD.float()).to(streams_TnD.dtype)


@hc_head.implement("cpu")
def _hc_head(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float
) -> Tensor:
    x, u = _mixes(streams_TnD, fn, norm_eps)
    pre = torch.addcmul(base, u, scale).sigmoid_().add_(hc_eps)
    return torch.bmm(pre[:, None], x).squeeze(1).to(streams_TnD.dtype)
