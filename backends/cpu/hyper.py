"""Hyper-connections in fp32: one projection, and a Sinkhorn chosen by the number of tokens.

Shapes as in ops/hyper.py. The projection and both reductions read the streams in pieces that stay in cache.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from backends.cpu.linear import matmul_nt
from backends.cpu.norm import PIECE, inverse_rms, piece_rows
from ops.hyper import hc_head, hc_post, hc_pre

# tokens up to which scalars in Python beat torch calls, and from which vectors along the tokens beat small products
_SCALAR_TOKENS, _VECTOR_TOKENS = 3, 192


def _collapse(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base_n: Tensor, norm_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor]:
    """Mixes u [T, rows of fn] and the streams weighted by the first n of them, in the streams' type."""
    t, n, d = streams_TnD.shape
    step = 2 * piece_rows(streams_TnD)
    if t > step:
        u, out_TD = fn.new_empty(t, fn.shape[0]), streams_TnD.new_empty(t, d)
        for i in range(0, t, step):
            part = _collapse(streams_TnD[i : i + step], fn, scale, base_n, norm_eps, hc_eps)
            u[i : i + step], out_TD[i : i + step] = part
        return u, out_TD
    x = streams_TnD.float()
    f = x.flatten(1)
    u = matmul_nt(f, fn).mul_(inverse_rms(f, norm_eps))
    pre = torch.addcmul(base_n, u[:, :n], scale).sigmoid_().add_(hc_eps)
    return u, torch.bmm(pre[:, None], x).squeeze(1).to(streams_TnD.dtype)


@functools.lru_cache(maxsize=8)
def _sums(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices that turn a row-major n x n matrix into its row sums and its column sums, each in every place it divides."""
    i = torch.arange(n * n, device=device)
    return (i[:, None] // n == i // n).float(), (i[:, None] % n == i % n).float()


def _sinkhorn_products(z_Tnn: Tensor, eps: float, iters: int) -> Tensor:
    """Two calls per normalisation: the sums as a small product, the division."""
    t, n, _ = z_Tnn.shape
    rows, columns = _sums(n, z_Tnn.device)
    added = z_Tnn.new_full((1, n * n), eps)
    p = torch.softmax(z_Tnn, -1).view(t, n * n).add_(eps)
    p.div_(torch.addmm(added, p, columns))
    for _ in range(iters - 1):
        p.div_(torch.addmm(added, p, rows))
        p.div_(torch.addmm(added, p, columns))
    return p.view(t, n, n)


def _sinkhorn_vectors(z_Tnn: Tensor, eps: float, iters: int) -> Tensor:
    """Tokens innermost, so that every step runs over long vectors."""
    p = torch.softmax(z_Tnn.permute(1, 2, 0).contiguous(), 1).add_(eps)
    p.div_(p.sum(0, keepdim=True).add_(eps))
    for _ in range(iters - 1):
        p.div_(p.sum(1, keepdim=True).add_(eps))
        p.div_(p.sum(0, keepdim=True).add_(eps))
    return p.permute(2, 0, 1).contiguous()


def _exponentials(z: list[float], eps: float) -> tuple[float, float, float, float]:
    top = max(z)
    a, b, c, d = (math.exp(value - top) for value in z)
    s = 1 / (a + b + c + d)
    return a * s + eps, b * s + eps, c * s + eps, d * s + eps


def _sinkhorn_scalars(z: list[float], eps: float, iters: int) -> list[float]:
    """One token's 4 x 4 matrix, row-major, in Python floats: a torch call costs more than a whole normalisation."""
    a, b, c, d = _exponentials(z[:4], eps)
    e, f, g, h = _exponentials(z[4:8], eps)
    i, j, k, m = _exponentials(z[8:12], eps)
    n, o, p, q = _exponentials(z[12:], eps)
    for step in range(iters):
        if step:
            s, t = 1 / (a + b + c + d + eps), 1 / (e + f + g + h + eps)
            u, v = 1 / (i + j + k + m + eps), 1 / (n + o + p + q + eps)
            a, b, c, d, e, f, g, h = a * s, b * s, c * s, d * s, e * t, f * t, g * t, h * t
            i, j, k, m, n, o, p, q = i * u, j * u, k * u, m * u, n * v, o * v, p * v, q * v
        s, t = 1 / (a + e + i + n + eps), 1 / (b + f + j + o + eps)
        u, v = 1 / (c + g + k + p + eps), 1 / (d + h + m + q + eps)
        a, b, c, d, e, f, g, h = a * s, b * t, c * u, d * v, e * s, f * t, g * u, h * v
        i, j, k, m, n, o, p, q = i * s, j * t, k * u, m * v, n * s, o * t, p * u, q * v
    return [a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q]


def _sinkhorn(z_Tnn: Tensor, eps: float, iters: int) -> Tensor:
    tokens, n, _ = z_Tnn.shape
    if n == 4 and tokens <= _SCALAR_TOKENS and z_Tnn.device.type == "cpu":
        flat = [value for z in z_Tnn.flatten(1).tolist() for value in _sinkhorn_scalars(z, eps, iters)]
        return torch.tensor(flat, dtype=torch.float32, device=z_Tnn.device).view(tokens, n, n)
    return (_sinkhorn_vectors if tokens >= _VECTOR_TOKENS else _sinkhorn_products)(z_Tnn, eps, iters)


@hc_pre.implement("cpu")
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    t, n, _ = streams_TnD.shape
    (s0, s1, s2), (b0, b1, b2) = scale.unbind(), base.split((n, n, n * n))
    u, x_TD = _collapse(streams_TnD, fn, s0, b0, norm_eps, hc_eps)
    _, u1, u2 = u.split((n, n, n * n), 1)
    post = torch.addcmul(b1, u1, s1).sigmoid_().mul_(2)
    logits = torch.addcmul(b2, u2, s2)
    return x_TD, post, _sinkhorn(logits.view(t, n, n), hc_eps, iters)


@hc_post.implement("cpu")
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    mix_Tnn, post_Tn1 = comb_Tnn.transpose(1, 2), post_Tn[:, :, None]
    if streams_TnD.numel() <= PIECE:
        mixed = torch.bmm(mix_Tnn, streams_TnD.float())
        return mixed.addcmul_(post_Tn1, y_TD.float()[:, None]).to(streams_TnD.dtype)
    out, step = torch.empty_like(streams_TnD, memory_format=torch.contiguous_format), piece_rows(streams_TnD)
    for i in range(0, out.shape[0], step):
        mixed = torch.bmm(mix_Tnn[i : i + step], streams_TnD[i : i + step].float())
        out[i : i + step] = mixed.addcmul_(post_Tn1[i : i + step], y_TD[i : i + step].float()[:, None])
    return out


@hc_head.implement("cpu")
def _hc_head(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float
) -> Tensor:
    return _collapse(streams_TnD, fn, scale, base, norm_eps, hc_eps)[1]
