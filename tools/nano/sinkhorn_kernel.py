"""Triton kernels for Sinkhorn of 4x4 matrices. Imported only where they are asked for.

N matrices, one block of them per program; half-step k divides columns when k is even, rows when it is odd.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202 (kernel arguments have no Python types)
from __future__ import annotations

from typing import Any

import torch

tl: Any = None
_BLOCK = 64
_compiled: dict[str, Any] = {}


def _forward(z_ptr, out_ptr, count, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = (i < count)[:, None, None] & (at >= 0)
    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    e = tl.exp(z - tl.max(z, 2)[:, :, None])
    p = e / tl.sum(e, 2)[:, :, None] + eps
    for k in range(STEPS):
        if k % 2 == 0:
            p = p / (tl.sum(p, 1)[:, None, :] + eps)
        else:
            p = p / (tl.sum(p, 2)[:, :, None] + eps)
    tl.store(out_ptr + at, p, mask=mask)


def _backward(z_ptr, up_ptr, out_ptr, count, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = (i < count)[:, None, None] & (at >= 0)
    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    e = tl.exp(z - tl.max(z, 2)[:, :, None])
    s = e / tl.sum(e, 2)[:, :, None]
    g = tl.load(up_ptr + at, mask=mask, other=0.0)
    for back in range(STEPS):
        k = STEPS - 1 - back
        p = s + eps
        for j in range(k):
            if j % 2 == 0:
                p = p / (tl.sum(p, 1)[:, None, :] + eps)
            else:
                p = p / (tl.sum(p, 2)[:, :, None] + eps)
        if k % 2 == 0:
            columns = tl.sum(p, 1)[:, None, :] + eps
            g = g / columns - tl.sum(g * p / (columns * columns), 1)[:, None, :]
        else:
            rows = tl.sum(p, 2)[:, :, None] + eps
            g = g / rows - tl.sum(g * p / (rows * rows), 2)[:, :, None]
    g = s * (g - tl.sum(s * g, 2)[:, :, None])
    tl.store(out_ptr + at, g, mask=mask)


def _kernel(name: str) -> Any:
    global tl
    if not _compiled:
        import triton
        import triton.language

        tl = triton.language
        _compiled.update(forward=triton.jit(_forward), backward=triton.jit(_backward))
    return _compiled[name]


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, iters, eps):
        z = logits.contiguous()
        out = torch.empty_like(z)
        count = z.shape[0]
        _kernel("forward")[(-(-count // _BLOCK),)](z, out, count, eps, STEPS=2 * iters - 1, BLOCK=_BLOCK)
        ctx.save_for_backward(z)
        ctx.settings = iters, eps
        return out

    @staticmethod
    def backward(ctx, up):
        (z,) = ctx.saved_tensors
        iters, eps = ctx.settings
        out, count = torch.empty_like(z), z.shape[0]
        _kernel("backward")[(-(-count // _BLOCK),)](z, up.contiguous(), out, count, eps, STEPS=2 * iters - 1, BLOCK=_BLOCK)
        return out, None, None


def apply(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """[N, 4, 4] fp32 -> [N, 4, 4] with gradient."""
    return _Sinkhorn.apply(logits, iters, eps)
