"""Small parts of the training model: mode switches, linear layers with fake quantisation, norms, rotary tables.

T tokens, N outputs, K inputs, R2 rotary pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.nano import fake
from tools.nano.fused import Fused
from v4 import rope
from v4.config import Config


@dataclass
class Mode:
    """Switches of a training stage. sparse: CSA sees only what the indexer selects; quantise: fake FP8 and FP4.

    window: tokens of the sliding window in place of the configuration's, if given.
    """

    sparse: bool = True
    quantise: bool = False
    window: int | None = None
    fused: Fused = field(default_factory=Fused)


class Tables(NamedTuple):
    """cos and sin [T, R2] of window-only layers and of compressed layers."""

    plain: tuple[Tensor, Tensor]
    compressed: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=8)
def tables(c: Config, length: int, device: torch.device) -> Tables:
    """Rotary tables of positions 0 to length - 1, by the inference graph's own formulas."""
    at = torch.arange(length)

    def of(compressed: bool) -> tuple[Tensor, Tensor]:
        cos, sin = rope.rows(rope.frequencies(c, compressed), at)
        return cos.to(device), sin.to(device)

    return Tables(of(False), of(True))


def matrix(n: int, k: int, *, count: int | None = None, gain: float = 1.0) -> nn.Parameter:
    """Random weights [N, K], or [count, N, K], of deviation gain * K^-1/2."""
    shape = (n, k) if count is None else (count, n, k)
    return nn.Parameter(torch.randn(shape) * (gain * k**-0.5))


class Linear(nn.Module):
    """x @ weight.T; packed: weight and activations take the FP8 round trips when the mode says so."""

    def __init__(self, mode: Mode, n: int, k: int, *, packed: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.mode, self.packed = mode, packed
        self.weight = matrix(n, k, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's type."""
        w: Tensor = self.weight
        if self.packed and self.mode.quantise:
            x, w = self.mode.fused.fp8_activation(x), fake.fp8_weight(w)
        return F.linear(x, w.to(x.dtype))


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, c: Config, mode: Mode, dim: int) -> None:
        super().__init__()
        self.mode, self.eps = mode, c.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.mode.fused.rms_norm(x, self.weight, self.eps)
