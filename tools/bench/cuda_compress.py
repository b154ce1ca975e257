"""Calls of the compressor that the CUDA bench times: every request completes an entry, or a prompt completes many.

Shapes as in ops/compress.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.bench.cuda_cases import BLOCK, TINY, Case, Inputs, Widths, host, randn

_X, _COS, _SIN, _STATE, _TABLE, _CU, _START = 0, 5, 6, 7, 8, 9, 10


def _part(ratio: int) -> Any:
    """A few sequences of one token each, or the first tokens of a prompt: a call of its own, which the kernel has to run anew."""

    def part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, None]:
        args = [host(a) for a in inputs.args]
        if len(args[_START]) > 1:
            few = list(tokens)
            for i in (_X, _COS, _SIN, _TABLE, _START):
                args[i] = args[i][few]
            args[_CU] = torch.arange(len(few) + 1, dtype=torch.int32)
        else:
            count = min(args[_X].shape[0], 3 * ratio)
            args[_X] = args[_X][:count]
            made = int(args[_START] + count) // ratio - int(args[_START]) // ratio
            args[_COS], args[_SIN] = args[_COS][:made], args[_SIN][:made]
            args[_CU] = torch.tensor([0, count], dtype=torch.int32)
        return Inputs(tuple(args), dict(inputs.kwargs)), None

    return part


def compress(w: Widths, batch: int, new: int, ratio: int) -> Case:
    """ratio 4 with overlapping windows, 128 without, over entries of the attention's width."""
    small = w is TINY
    ratio = {4: 2, 128: 4}[ratio] if small else ratio
    overlap = ratio in (2, 4) and not (small and ratio == 4)
    start = 128 * 40 - (1 if new == 1 else 0)

    def make(g: torch.Generator) -> Inputs:
        c, wide = w.channels, (2 if overlap else 1) * w.channels
        tokens, entries = batch * new, batch * ((start + new) // ratio - start // ratio)
        first, last = (start // ratio - 1) * ratio // BLOCK, (start + new - 1) // BLOCK
        table = torch.zeros(batch, last + 1, dtype=torch.int32, device=g.device)
        table[:, first:] = (torch.arange(batch * (last + 1 - first), device=g.device).view(batch, -1) + 1).int()
        angle = torch.rand(entries, w.pairs, generator=g, device=g.device) * 1e4

        def fp32(*shape: int) -> Tensor:
            return randn(g, *shape, dtype=torch.float32)

        weights = (randn(g, wide, w.hidden) * w.hidden**-0.5, randn(g, wide, w.hidden) * w.hidden**-0.5)
        state = fp32(int(table.max()) + 1, BLOCK, 2 * wide)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=g.device) * new
        starts = torch.full((batch,), start, dtype=torch.int32, device=g.device)
        args = (randn(g, tokens, w.hidden), *weights, fp32(ratio, wide), randn(g, c), angle.cos(), angle.sin(), state, table, cu, starts)
        return Inputs(args, {"ratio": ratio, "eps": 1e-6})

    name = f"compress ratio {ratio} {'prefill' if new > 1 else 'decode'} T={batch * new}"
    return Case("compress", name, batch * new, make, _part(ratio), new > 1, False)
