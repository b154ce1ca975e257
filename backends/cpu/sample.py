"""Token choice on the CPU without sorting the vocabulary: masses per interval of logits lead to the interval that decides.

Shapes: logits [B, V], everything else [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.sample import argmax, sample

_BINS = 4096
_DEEPEST = 104.0  # exp(-104) is 0 in fp32


@argmax.implement("cpu")
def _argmax(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1)  # the first of equal values


def _largest(logits_V: Tensor, size: int) -> Tensor:
    """Ids of the `size` largest logits by descending logit, equal ones by ascending id."""
    threshold = torch.topk(logits_V, size, sorted=False).values.min()
    ids = torch.nonzero(logits_V >= threshold)[:, 0]
    return ids[torch.sort(logits_V[ids], descending=True, stable=True).indices[:size]]


class _Masses:
    """Unnormalised probabilities of one row, summed over intervals of the logit in descending order."""

    def __init__(self, logits_V: Tensor, temperature: float) -> None:
        self.logits_V = logits_V
        z_V = (logits_V.float() - logits_V.max().float()) / temperature
        self.weights_V = z_V.exp().double()
        self.bins_V = z_V.mul_(-_BINS / _DEEPEST).clamp_max_(_BINS - 1).int()
        self.upto = torch.bincount(self.bins_V, self.weights_V, minlength=_BINS).cumsum(0)
        self.total = float(self.upto[-1])

    def find(self, target: float, *, beyond: bool) -> tuple[Tensor, float]:
        """First token whose cumulative mass reaches (`beyond`: exceeds) `target`, and that mass."""
        last = int(torch.searchsorted(self.upto, self.total))  # rounding must not lead past the last interval with mass
        b = min(int(torch.searchsorted(self.upto, target, right=beyond)), last)
        ids = torch.nonzero(self.bins_V == b)[:, 0]
        ids = ids[torch.sort(self.logits_V[ids], descending=True, stable=True).indices]
        cumulative = self.weights_V[ids].cumsum(0) + (float(self.upto[b - 1]) if b else 0.0)
        place = min(int(torch.searchsorted(cumulative, target, right=beyond)), len(ids) - 1)
        return ids[place], float(cumulative[place])


def _draw(logits_V: Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> Tensor:
    ids = _largest(logits_V, min(top_k, len(logits_V))) if top_k > 0 else None
    masses = _Masses(logits_V if ids is None else logits_V[ids], temperature)
    kept = masses.find(top_p * masses.total, beyond=False)[1] if top_p < 1 else masses.total
    token = masses.find(uniform * kept, beyond=True)[0]
    return token if ids is None else ids[token]


@sample.implement("cpu")
def _sample(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    tokens_B = logits_BV.argmax(-1)
    rows = zip(temperature_B.tolist(), top_k_B.tolist(), top_p_B.tolist(), uniform_B.tolist(), strict=True)
    for row, (temperature, top_k, top_p, uniform) in enumerate(rows):
        if temperature != 0:
            tokens_B[row] = _draw(logits_BV[row], temperature, top_k, top_p, uniform)
    return tokens_B
