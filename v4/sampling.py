"""Choosing tokens from logits: greedy, temperature, top-k, top-p; deterministic given a seed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from v4.cache import HOST


class Sampler:
    """Calls the bound argmax or sample op with uniforms drawn on the host from `seed`, so that every backend sees the same ones.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. ValueError for values outside their range.
    """

    def __init__(
        self, ops: SimpleNamespace, *, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature: found {temperature}, expected 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: found {top_p}, expected a value in (0, 1]")
        if top_k < 0:
            raise ValueError(f"top_k: found {top_k}, expected 0 (off) or more")
        self._ops = ops
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._generator = torch.Generator(HOST).manual_seed(seed)

    @property
    def greedy(self) -> bool:
        """True when the largest logit is taken."""
        return self.temperature == 0

    def __call__(self, logits_BV: Tensor) -> list[int]:
        """One token per row; the lowest id wins exact ties."""
        if self.greedy:
            return self._ops.argmax(logits_BV).tolist()
        b = logits_BV.shape[0]
        device = logits_BV.device
        uniform = torch.rand(b, generator=self._generator, dtype=torch.float32, device=HOST)
        return self._ops.sample(
            logits_BV,
            torch.full((b,), self.temperature, device=device),
            torch.full((b,), self.top_k, dtype=torch.int32, device=device),
            torch.full((b,), self.top_p, device=device),
            uniform.to(device),
        ).tolist()
