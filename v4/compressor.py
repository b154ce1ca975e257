"""Window pooling into compressed entries: parameters of one compressor and its call.

Shapes: T tokens, D hidden, m ratio, c entry width, w projection width (2c with overlap), E entries completed by the call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4.batch import Batch
from v4.linear import Linear, parameter
from v4.norm import Norm
from v4.settings import Settings


class Compressor(nn.Module):
    """Projections, absolute position bias and norm of one compressor (specification section 6)."""

    def __init__(self, s: Settings, ratio: int, width: int) -> None:
        super().__init__()
        c = s.config
        self.ops, self.ratio, self.eps = s.ops, ratio, c.rms_norm_eps
        w = width * (2 if ratio == 4 else 1)
        self.wkv = Linear(s.ops, w, c.hidden_size, dtype=s.dtype)
        self.wgate = Linear(s.ops, w, c.hidden_size, dtype=s.dtype)
        self.ape = parameter((ratio, w), torch.float32)
        self.norm = Norm(s, width)

    def forward(self, x_TD: Tensor, state: Tensor, batch: Batch) -> Tensor:
        """Entries [E, c] completed by this call, normalised and rotated; updates the token state in the cache."""
        made = batch.entries[self.ratio]
        return self.ops.compress(
            x_TD,
            self.wkv.weight,
            self.wgate.weight,
            self.ape,
            self.norm.weight,
            made.cos,
            made.sin,
            state,
            batch.tables[f"state{self.ratio}"],
            batch.cu_seqlens,
            batch.start_pos,
            ratio=self.ratio,
            eps=self.eps,
        )
