"""Launches of the choice of the k largest scores; how it works and what it moves is told in kernels/choice.py.

Shapes: T tokens of a call, C columns, k chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.cuda_triton.launch import blocks, kernels, power

MOST = 4096
"""Largest k: twice as many values are the most that a program holds."""

ALIGN = 16
"""Columns that the pitch of a row of scores has to be a multiple of: no group is longer, and 16 bytes are read at a time."""

_READ = 8192
"""Columns of which a program finds the peaks."""
_FEW = 8
"""Rows up to which values are read before the row's length is known, which may be more than needed."""


@dataclass(frozen=True)
class Sizes:
    """Values among which a program chooses without peaks, columns of a group, and values of a warp."""

    whole: int
    group: int
    per_warp: int


def sizes(rows: int, topk: int) -> Sizes:
    """Sizes for so many rows; chosen by measurement on an H100 (docs/performance.md)."""
    whole, group, per_warp = (4096, 4, 512) if rows > 1024 else (8192, 8, 512)
    # k groups fill at most what a program holds
    return Sizes(whole, max(min(group, whole // power(topk)), 2), per_warp)


def levels(columns: int, plan: Sizes) -> tuple[int, ...]:
    """Values of each level, scores first, until few enough are left for one program."""
    found = [columns]
    while found[-1] > plan.whole:
        found.append(blocks(found[-1], plan.group))
    return tuple(found)


def choose(index: Tensor, score: Tensor, cu: Tensor, start: Tensor, first: int, ratio: int, columns: int | None = None) -> None:
    """Write to index int32 [T, k] the entries with the largest score of each token from `first`, rising, -1 behind the last.

    score fp32 [T or more, pitch], contiguous, pitch a multiple of ALIGN; entries i < min((position + 1) // ratio, columns) count, equal
    scores go to the lowest. cu int32 [B + 1], start int32 [B] as in ops/indexer.py. T at most 65535. ValueError for another pitch.
    """
    (count, topk), pitch = index.shape, score.shape[1]
    if pitch % ALIGN or not score.is_contiguous():
        raise ValueError(
            f"score is {tuple(score.shape)}, strides {score.stride()}; expected contiguous rows of a multiple of {ALIGN}"
        )
    columns, batch, plan = pitch if columns is None else columns, start.shape[0], sizes(count, topk)
    group, held = plan.group, levels(columns, plan)
    top, eager = len(held) - 1, count <= _FEW
    peaks = _peaks(held, group, score, cu, start, first, ratio, count)
    passed = torch.empty(count, top, topk, dtype=torch.int32, device=index.device)
    first_block, block = power(held[top], 16), power(topk) * group
    kernels("choice").choose[(count,)](
        score, peaks, passed, cu, start, index, first, batch, columns, pitch, peaks.stride(0), topk, ratio, LEVELS=top, GROUP=group,
        BATCH=power(batch), BLOCK_TOP=first_block, BLOCK_E=block, BLOCK_K=power(topk), EAGER=eager,
        num_warps=min(max(max(first_block, block if top else 0) // plan.per_warp, 1), 32),
    )  # fmt: skip


def _peaks(held: tuple[int, ...], group: int, score: Tensor, cu: Tensor, start: Tensor, first: int, ratio: int, count: int) -> Tensor:
    """Peaks int32 [T, values] of every level above the scores, each padded to ALIGN values; a launch makes three levels."""
    widths = [blocks(size, ALIGN) * ALIGN for size in held[1:]]
    whole = torch.empty(count, sum(widths), dtype=torch.int32, device=score.device)
    made: list[Tensor] = list(whole.split(widths, dim=1)) if widths else []
    source, batch = score, start.shape[0]
    for level in range(0, len(made), 3):
        new, read = made[level : level + 3], max(_READ, group**3)
        second, third = widths[level], sum(widths[level : level + 2])
        kernels("choice").peaks[(blocks(held[level], read), count)](
            source, new[0], cu, start, first, batch, held[0], source.stride(0), whole.stride(0), second, third, ratio, LEVELS=len(new),
            SPAN=group**level, GROUP=group, BATCH=power(batch), BLOCK_E=read, EAGER=count <= _FEW, num_warps=8,
        )  # fmt: skip
        source = new[-1]
    return whole
