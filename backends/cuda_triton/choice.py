"""Launches of the choice of the k largest scores; how it works and what it moves is told in kernels/choice.py.

Shapes: T tokens of a call, C columns, k chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import blocks, kernels, power

MOST = 4096
"""Largest k: twice as many values are the most that a program holds."""

ALIGN = 16
"""Columns that the pitch of a row of scores has to be a multiple of: no group is longer, and 16 bytes are read at a time."""

_WHOLE = 8192
"""Values among which a program chooses without peaks."""
_READ = 8192
"""Columns of which a program finds the peaks."""
_GROUP = 8
_PER_WARP = 512
"""Values of a warp of a choice."""


def _group(topk: int) -> int:
    # k groups fill at most what a program holds
    return max(min(_GROUP, _WHOLE // power(topk)), 2)


def levels(columns: int, topk: int) -> tuple[int, ...]:
    """Values of each level, scores first, until few enough are left for one program."""
    sizes, group = [columns], _group(topk)
    while sizes[-1] > _WHOLE:
        sizes.append(blocks(sizes[-1], group))
    return tuple(sizes)


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
    columns = pitch if columns is None else columns
    sizes, group, batch = levels(columns, topk), _group(topk), start.shape[0]
    top = len(sizes) - 1
    values = [score, *_peaks(sizes, group, score, cu, start, first, ratio, count)]
    bound = torch.empty(count, dtype=torch.int32, device=index.device)
    chosen = index
    for level in range(top, -1, -1):
        out = torch.empty(count, topk, dtype=torch.int32, device=index.device) if level else index
        block = power(sizes[level], 16) if level == top else power(topk) * group
        kernels("choice").choose[(count,)](
            values[level], chosen, bound, cu, start, out, first, batch, columns, values[level].stride(0), topk, ratio, SPAN=group**level,
            FIRST=level == top, LAST=level == 0, GROUP=group, BATCH=power(batch), BLOCK_E=block, BLOCK_K=power(topk),
            num_warps=min(max(block // _PER_WARP, 1), 16),
        )  # fmt: skip
        chosen = out


def _peaks(
    sizes: tuple[int, ...], group: int, score: Tensor, cu: Tensor, start: Tensor, first: int, ratio: int, count: int
) -> list[Tensor]:
    """Peaks int32 [T, values] of every level above the scores; a launch makes three levels."""
    widths = [blocks(size, ALIGN) * ALIGN for size in sizes[1:]]
    whole = torch.empty(count, sum(widths), dtype=torch.int32, device=score.device)
    made: list[Tensor] = list(whole.split(widths, dim=1)) if widths else []
    source, batch = score, start.shape[0]
    for level in range(0, len(made), 3):
        new, read = made[level : level + 3], max(_READ, group**3)
        second, third = widths[level], sum(widths[level : level + 2])
        kernels("choice").peaks[(blocks(sizes[level], read), count)](
            source, new[0], cu, start, first, batch, sizes[0], source.stride(0), whole.stride(0), second, third, ratio, LEVELS=len(new),
            SPAN=group**level, GROUP=group, BATCH=power(batch), BLOCK_E=read, num_warps=8,
        )  # fmt: skip
        source = new[-1]
    return made
