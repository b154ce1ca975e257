"""Stages of training: context, whether selection and fake quantisation are on, and the learning rate, all by step number."""

from __future__ import annotations

import math
from typing import NamedTuple

from tools.nano.batches import Plan
from tools.nano.layers import Mode


class Stage(NamedTuple):
    """share: part of all steps; window: tokens of the sliding window, None for the configuration's."""

    share: float
    length: int
    sparse: bool
    quantise: bool
    window: int | None

    def apply(self, mode: Mode) -> None:
        """Set the switches of `mode`."""
        mode.sparse, mode.quantise, mode.window = self.sparse, self.quantise, self.window


STAGES = (
    Stage(0.25, 256, False, False, 16),
    Stage(0.27, 1024, False, False, 16),
    Stage(0.13, 1024, True, False, None),
    Stage(0.20, 4096, True, False, None),
    Stage(0.15, 4096, True, True, None),
)
"""Short and dense first, so that attention learns to retrieve before the indexer has to choose; quantised last.

The window starts small: six windows of 128 in a row span 256 tokens, and a run in which they learned to carry the facts never
learned to fetch them from compressed entries, neither at 1,024 nor at 4,096 tokens.
"""


def stage_of(step: int, steps: int, stages: tuple[Stage, ...] = STAGES) -> Stage:
    """The stage of a step."""
    at = 0.0
    for stage in stages:
        at += stage.share
        if step < round(at * steps):
            return stage
    return stages[-1]


def plans(steps: int, tokens: int, longest: int, stages: tuple[Stage, ...] = STAGES) -> list[Plan]:
    """Batch sizes of every step: `tokens` in each, lengths capped at `longest`. ValueError when a row does not fit into a batch."""
    out = []
    for step in range(steps):
        length = min(stage_of(step, steps, stages).length, longest)
        if tokens < length:
            raise ValueError(f"batch of {tokens} tokens: a row has {length}; raise --tokens or lower --longest")
        out.append(Plan(tokens // length, length))
    return out


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 2 % (at least 20 steps), then a cosine down to 3 % of the peak."""
    warm = max(20, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))
