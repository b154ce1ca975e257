"""RMS norm with a weight."""

from __future__ import annotations

from torch import Tensor, nn

from v4.linear import parameter
from v4.settings import Settings


class Norm(nn.Module):
    """rms_norm over the last dimension with weight [D]."""

    def __init__(self, s: Settings, dim: int) -> None:
        super().__init__()
        self.ops, self.eps = s.ops, s.config.rms_norm_eps
        self.weight = parameter((dim,), s.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.ops.rms_norm(x, self.weight, eps=self.eps)
