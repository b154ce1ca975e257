"""Triton kernels for Sinkhorn of 4x4 matrices. Imported only where they are asked for.

N matrices, one block of them per program; half-step k divides columns when k is even, rows when it is odd.
"""

# mypy: ignore-errors
from __future__ import annotations


import torch


def _build():  # noqa: ANN202
    import triton
    import triton.language as tl

    @triton.jit
    def half(p, k, eps):
        columns = tl.sum(p, 1)[:, None, :]
        rows = tl.sum(p, 2)[:, :, None]
        return p / (tl.where(k % 2 == 0, columns + 0.0 * p, rows + 0.0 * p) + eps)

    @triton.jit
    def start(z, eps):
        e = tl.exp(z - tl.max(z, 2)[:, :, None])
        return e / tl.sum(e, 2)[:, :, None]

    @triton.jit
    def forward(z_ptr, out_ptr, count, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = i[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        mask = (i < count)[:, None, None] & (at >= 0)
        p = start(tl.load(z_ptr + at, mask=mask, other=0.0), eps) + eps
        for k in range(STEPS):
            p = half(p, k, eps)
        tl.store(out_ptr + at, p, mask=mask)

    @triton.jit
    def backward(z_ptr, up_ptr, out_ptr, count, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = i[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        mask = (i < count)[:, None, None] & (at >= 0)
        s = start(tl.load(z_ptr + at, mask=mask, other=0.0), eps)
        g = tl.load(up_ptr + at, mask=mask, other=0.0)
        for back in range(STEPS):
            k = STEPS - 1 - back
            p = s + eps
            for j in range(k):
                p = half(p, j, eps)
            columns = tl.sum(p, 1)[:, None, :] + 0.0 * p
            rows = tl.sum(p, 2)[:, :, None] + 0.0 * p
            total = tl.where(k % 2 == 0, columns, rows) + eps
            dot = g * p / (total * total)
            moved = tl.where(k % 2 == 0, tl.sum(dot, 1)[:, None, :] + 0.0 * p, tl.sum(dot, 2)[:, :, None] + 0.0 * p)
            g = g / total - moved
        g = s * (g - tl.sum(s * g, 2)[:, :, None])
        tl.store(out_ptr + at, g, mask=mask)

    return forward, backward


_KERNELS = None
_BLOCK = 64


def _kernels():  # noqa: ANN202
    global _KERNELS
    if _KERNELS is None:
        import triton.language  # noqa: F401

        _KERNELS = _build()
    return _KERNELS


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, iters, eps):  # noqa: ANN001, ANN205
        z = logits.contiguous()
        out = torch.empty_like(z)
        count = z.shape[0]
        _kernels()[0][(-(-count // _BLOCK),)](z, out, count, eps, STEPS=2 * iters - 1, BLOCK=_BLOCK)
        ctx.save_for_backward(z)
        ctx.settings = iters, eps
        return out

    @staticmethod
    def backward(ctx, up):  # noqa: ANN001, ANN205
        (z,) = ctx.saved_tensors
        iters, eps = ctx.settings
        out, count = torch.empty_like(z), z.shape[0]
        _kernels()[1][(-(-count // _BLOCK),)](z, up.contiguous(), out, count, eps, STEPS=2 * iters - 1, BLOCK=_BLOCK)
        return out, None, None


def apply(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """[N, 4, 4] fp32 -> [N, 4, 4] with gradient."""
    return _Sinkhorn.apply(logits, iters, eps)
