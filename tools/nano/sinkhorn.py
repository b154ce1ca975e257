"""Sinkhorn normalisation of many 4x4 matrices with gradient: plain torch, or one kernel per direction.

N matrices; n rows and columns. The order of the divisions is that of the specification, section 3: softmax over rows, columns,
then (rows, columns) 19 times. The kernel's backward pass makes every intermediate again instead of storing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def plain(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[N, n, n] fp32 -> [N, n, n]."""
    p = torch.softmax(logits, -1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return p


def sinkhorn(kind: str) -> Callable[[Tensor, int, float], Tensor]:
    """The function of `kind`, "torch" or "triton". ValueError for another."""
    if kind == "torch":
        return plain
    if kind == "triton":
        from tools.nano.sinkhorn_kernel import apply

        return apply
    raise ValueError(f"sinkhorn {kind!r}: expected 'torch' or 'triton'")


def check(function: Callable[..., Any], device: torch.device) -> float:
    """Largest difference of values and gradients from `plain` on random matrices."""
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(300, 4, 4, generator=g)).to(device)
    up = torch.randn(300, 4, 4, generator=g).to(device)
    results = []
    for f in (plain, function):
        x = z.clone().requires_grad_()
        y = f(x, 20, 1e-6)
        y.backward(up)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
