"""Prompts on which no choice of the model is a near tie.

Two fp32 evaluations differ by about 1e-6 of scale in a score. An expert or an entry chosen by less than that can be refused
by the other evaluation, and the logits then move by far more than rounding. Tests that compare within a tolerance take their
prompts from here, so that the tolerance need not cover such flips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import v4
from tests import spec_formulas, tiny
from tests.tolerance import replaced

MARGIN = 1e-5
"""Least gap between the last chosen and the first refused item, in units of the largest score."""
TRIES = 300


class _Gaps:
    """Smallest gap over all choices of the gates and the indexers of one prompt."""

    def __init__(self) -> None:
        self.least = float("inf")

    def _see(self, scores: Tensor, topk: int) -> None:
        """scores [T, N], minus infinity where an item is not offered; rows that take everything offered decide nothing."""
        if scores.shape[-1] <= topk:
            return
        best = scores.topk(topk + 1, dim=-1).values
        deciding = torch.isfinite(best[:, -1])
        gap = (best[:, -2] - best[:, -1]) / scores.masked_fill(scores.isinf(), 0.0).abs().amax(-1)
        self.least = min([self.least, *gap[deciding].tolist()])

    def wrap(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Watch the two ops that choose."""

        def gate(x: Tensor, weight: Tensor, bias: Tensor, *, topk: int, scale: float) -> Any:
            self._see(torch.nn.functional.softplus(x @ weight.T).sqrt() + bias, topk)
            return fn(x, weight, bias, topk=topk, scale=scale)

        def index(q: Tensor, w: Tensor, cache: Tensor, table: Tensor, *rest: Tensor, ratio: int, topk: int) -> Any:
            rows = torch.arange(len(q) // ratio)
            keys = cache[table[0].long()[rows // cache.shape[1]], rows % cache.shape[1]]
            self._see(spec_formulas.index_scores(q, w, keys), topk)
            return fn(q, w, cache, table, *rest, ratio=ratio, topk=topk)

        watched: dict[str, Callable[..., Any]] = {"gate_topk": gate, "index_topk": index}
        return watched.get(name, fn)


@functools.cache
def prompts(name: str, count: int = 6, length: int = tiny.LENGTH) -> tuple[tuple[int, ...], ...]:
    """The first `count` random prompts of `length` tokens that are clear of near ties on a model of tiny.MODELS.

    ValueError when fewer are found among TRIES.
    """
    model = v4.load(tiny.checkpoint(name), backend="cpu", dtype=torch.float32, numerics="exact")
    found: list[tuple[int, ...]] = []
    for seed in range(TRIES):
        gaps, ids = _Gaps(), tiny.tokens(length, seed=seed)
        with replaced(model.binding.ops, gaps.wrap):
            model.logits(ids)
        if gaps.least > MARGIN:
            found.append(tuple(ids))
        if len(found) == count:
            return tuple(found)
    raise ValueError(f"{name}: {len(found)} of {TRIES} prompts are clear of near ties, {count} are wanted")
