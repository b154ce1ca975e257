"""Hyper-connections. Shapes: T tokens, n streams, d channels."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, require, require_dtype, require_shape, soc
from tools.npu_standin.models.rounding import hf32

WIDTHS = (4096, 7168)
_exact = False


def set_exact(exact: bool) -> None:
    """True: the product of hc_pre in fp32, which no chip does. For telling what HF32 alone changes."""
    global _exact
    _exact = exact


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """softmax + eps, then columns, then (rows, columns) iterations - 1 times; every divisor has + eps."""
    p = logits.softmax(-1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return p


def _check_streams(op: str, x: Tensor, n: int) -> None:
    require(x.dim() in (3, 4) and x.shape[-2] == n, op, f"x {list(x.shape)}", f"[T, {n}, d] or [b, s, {n}, d]")
    require(x.shape[-1] in WIDTHS, op, f"d = {x.shape[-1]}", f"d in {WIDTHS}")
    require(x.numel() > 0, op, "T = 0", "at least one token")


@model("custom::npu_hc_pre")
def npu_hc_pre(
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    *,
    hc_mult: int = 4,
    hc_sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """y bf16 [T, d], post fp32 [T, 4], comb fp32 [T, 4, 4] of x bf16 [T, 4, d]. The product is done in HF32: hc_fn is cut to 10 bits of mantissa."""
    op = "npu_hc_pre"
    require(hc_mult == 4, op, f"hc_mult {hc_mult}", "4")
    _check_streams(op, x, hc_mult)
    require_dtype(op, "x", x, torch.bfloat16)
    d = x.shape[-1]
    for name, found, shape in (("hc_fn", hc_fn, (24, 4 * d)), ("hc_scale", hc_scale, (3,)), ("hc_base", hc_base, (24,))):
        require_dtype(op, name, found, torch.float32)
        require_shape(op, name, found, *shape)
    tokens = x.numel() // (4 * d)
    require(
        soc() in OLDER or tokens <= 512 or tokens % 8192 == 0,
        op,
        f"{tokens} tokens on 950",
        "up to 512 tokens or a multiple of 8192",
    )
    flat = x.float().flatten(-2)
    rstd = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    mixes = (flat @ (hc_fn if _exact else hf32(hc_fn)).T) * rstd
    pre = torch.sigmoid(mixes[..., :4] * hc_scale[0] + hc_base[:4]) + hc_eps
    post = 2 * torch.sigmoid(mixes[..., 4:8] * hc_scale[1] + hc_base[4:8])
    comb = sinkhorn((mixes[..., 8:] * hc_scale[2] + hc_base[8:]).unflatten(-1, (4, 4)), hc_sinkhorn_iters, hc_eps)
    return (pre[..., None] * x.float()).sum(-2).to(torch.bfloat16), post, comb


def _mixed(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y_i = post_i * x + sum over j of comb[j, i] * residual_j, in the type of residual."""
    return (post.float()[..., None] * x.float()[..., None, :] + comb.float().transpose(-1, -2) @ residual.float()).to(
        residual.dtype
    )


@model("custom::npu_hc_post")
def npu_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y [T, 4, d]: y_i = post_i * x + sum over j of comb[j, i] * residual_j; x [T, d], residual [T, 4, d], post [T, 4], comb [T, 4, 4]."""
    op = "npu_hc_post"
    _check_streams(op, residual, 4)
    require_dtype(op, "residual", residual, torch.bfloat16, torch.float16, torch.float32)
    require_dtype(op, "x", x, residual.dtype)
    require_dtype(op, "comb", comb, post.dtype)
    lead = residual.shape[:-2]
    require_shape(op, "x", x, *lead, residual.shape[-1])
    require_shape(op, "post", post, *lead, 4)
    require_shape(op, "comb", comb, *lead, 4, 4)
    return _mixed(x, residual, post, comb)


@model("npu::npu_mhc_post")
def npu_mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor) -> Tensor:
    """The same with other names: x is the residual stream [T, n, D], h_out the output of the layer [T, D], h_res [T, n, n], h_post [T, n]."""
    op = "npu_mhc_post"
    mix = needed(op, "h_res", h_res)
    require(x.dim() in (3, 4), op, f"x {list(x.shape)}", "[T, n, D] or [B, S, n, D]")
    n, d = x.shape[-2:]
    require(
        n in (4, 6, 8) and d % 16 == 0 and d <= 16384, op, f"n = {n}, D = {d}", "n in 4, 6, 8; D a multiple of 16 up to 16384"
    )
    require_dtype(op, "x", x, torch.bfloat16, torch.float16)
    require_dtype(op, "h_out", h_out, x.dtype)
    require_dtype(op, "h_res", mix, torch.float32)
    require_dtype(op, "h_post", h_post, torch.float32)
    lead = x.shape[:-2]
    require_shape(op, "h_out", h_out, *lead, d)
    require_shape(op, "h_post", h_post, *lead, n)
    require_shape(op, "h_res", mix, *lead, n, n)
    return _mixed(h_out, x, h_post, mix)


@model("npu::npu_mhc_pre", socs=("950",))
def npu_mhc_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    gamma: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    out_flag: int = 0,
    inner_precise: int = 0,
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    """h_in [T, D], h_post fp32 [T, n] and the raw logits of comb fp32 [T, n, n]. Outputs 4 to 6 are None without out_flag, whatever Meta says."""
    op = "npu_mhc_pre"
    require(out_flag == 0, op, f"out_flag {out_flag}", "0 (not modelled otherwise)")
    require(x.dim() in (3, 4), op, f"x {list(x.shape)}", "[T, n, D] or [B, S, n, D]")
    n, d = x.shape[-2:]
    require(
        n in (4, 6, 8) and d % 16 == 0 and d <= 16384, op, f"n = {n}, D = {d}", "n in 4, 6, 8; D a multiple of 16 up to 16384"
    )
    require_dtype(op, "x", x, torch.bfloat16, torch.float16)
    for name, found, shape in (("phi", phi, (n * n + 2 * n, n * d)), ("bias", bias, (n * n + 2 * n,))):
        require_dtype(op, name, found, torch.float32)
        require_shape(op, name, found, *shape)
    require(
        tuple(alpha.shape) == (3,),
        op,
        f"alpha {list(alpha.shape)}",
        "[3] (2 elements are accepted too and not modelled; 1, as in hc_head, is not)",
    )
    require(gamma is None, op, "gamma", "None (not modelled)")
    flat = x.float().flatten(-2)
    require(inner_precise in (0, 1), op, f"inner_precise {inner_precise}", "0 (fp32) or 1 (HF32)")
    mixes = (flat @ (hf32(phi) if inner_precise else phi).T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mixes[..., :n] * alpha[0] + bias[:n]) + hc_eps
    post = 2 * torch.sigmoid(mixes[..., n : 2 * n] * alpha[1] + bias[n : 2 * n])
    logits = (mixes[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))
    return (pre[..., None] * x.float()).sum(-2).to(x.dtype), post, logits, None, None, None


@model("npu::npu_mhc_sinkhorn")
def npu_mhc_sinkhorn(x: Tensor, *, eps: float = 1e-6, num_iters: int = 20, out_flag: int = 0) -> tuple[Tensor, None, None]:
    """Sinkhorn of logits fp32 [T, n, n]; outputs 2 and 3 are None without out_flag."""
    op = "npu_mhc_sinkhorn"
    require(out_flag == 0, op, f"out_flag {out_flag}", "0 (not modelled otherwise)")
    require_dtype(op, "x", x, torch.float32)
    require(
        x.dim() in (3, 4) and x.shape[-1] == x.shape[-2] and x.shape[-1] in (4, 6, 8),
        op,
        f"x {list(x.shape)}",
        "[.., n, n], n in 4, 6, 8",
    )
    return sinkhorn(x, num_iters, eps), None, None
