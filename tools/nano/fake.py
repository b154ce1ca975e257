"""Fake quantisation with straight-through gradients: the values that the inference graph would see, the gradient of the identity.

Shapes: x [..., K]; weights [N, K] (experts [E, N, K]).
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded.to(x.dtype) - x).detach()


def _scale(amax: Tensor, largest: float, floor: float) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=floor) / largest)))


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def _e2m1(x: Tensor) -> Tensor:
    y = x.abs()
    # steps of 1/2 below 2, of 1 below 4 and of 2 above: each rounding is right in its range and too large outside
    value = torch.minimum(torch.minimum((2 * y).round() / 2, y.round().clamp(min=2)), (2 * (y / 2).round()).clamp(min=4))
    value = torch.where(y < 1.75, (2 * y).round() / 2, torch.where(y < 3.5, y.round(), 2 * (y / 2).round()))
    return value.clamp(max=FP4_MAX) * x.sign()


def fp8_activation(x: Tensor, group: int = 128, channels: int | None = None) -> Tensor:
    """FP8 round trip per token and `group` channels, of the first `channels` only if given; others stay as they are."""
    head = x if channels is None else x[..., :channels]
    g = head.detach().float().unflatten(-1, (-1, group))
    s = _scale(g.abs().amax(-1, keepdim=True), FP8_MAX, 1e-4)
    out = _through(head, (_e4m3(g / s) * s).flatten(-2))
    return out if channels is None else torch.cat([out, x[..., channels:]], -1)


def fp8_weight(w: Tensor, block: int = 128) -> Tensor:
    """FP8 round trip of a matrix in blocks of 128x128 with power-of-two scales; both dimensions must be multiples of the block."""
    blocks = w.detach().float().unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    s = _scale(blocks.abs().amax((-3, -1), keepdim=True), FP8_MAX, 1e-4)
    return _through(w, (_e4m3(blocks / s) * s).flatten(-2).flatten(-3, -2))


def fp4(x: Tensor, group: int = 32) -> Tensor:
    """FP4 e2m1 round trip per row and `group` columns."""
    g = x.detach().float().unflatten(-1, (-1, group))
    s = _scale(g.abs().amax(-1, keepdim=True), FP4_MAX, 6.0 * 2.0**-126)
    return _through(x, (_e2m1(g / s) * s).flatten(-2))


def hadamard_matrix(width: int, device: torch.device) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix in Sylvester order, fp32 [width, width]; width must be a power of two."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h * width**-0.5
