"""Calls of grouped experts and of the index choice that the CUDA bench times.

Shapes: A rows sorted by expert, E experts, D hidden, I inner width; T tokens, H index heads, d index width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.bench.cuda_cases import BLOCK, TINY, Case, Inputs, Widths, batch_of, pool, randn, single


def experts_part(inputs: Inputs, rows: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
    """A few rows with the weights of their experts alone; the rows come in ascending order, hence sorted by expert."""
    x, row_weight, counts, *weights = inputs.args
    ends = counts.cumsum(0).tolist()
    owner = [next(e for e, end in enumerate(ends) if r < end) for r in rows]
    used = sorted(set(owner))
    few = torch.tensor([owner.count(e) for e in used])
    args = (x[list(rows)].cpu(), row_weight[list(rows)].cpu(), few, *(_pick(w, used) for w in weights))
    return Inputs(args, dict(inputs.kwargs)), lambda found: [found[list(rows)].cpu()]


def _pick(weight: Tensor, experts: list[int]) -> Tensor:
    if weight.dtype == torch.float8_e8m0fnu:
        return weight.view(torch.uint8)[experts].cpu().view(weight.dtype)
    return weight[experts].cpu()


def experts(w: Widths, op: str, tokens: int) -> Case:
    """Uniform routing of `tokens` tokens to w.active experts each."""

    def make(g: torch.Generator) -> Inputs:
        routed = torch.rand(tokens, w.experts, generator=g, device=g.device).topk(w.active).indices
        counts = torch.bincount(routed.flatten(), minlength=w.experts)
        rows = tokens * w.active
        weight = torch.rand(rows, generator=g, device=g.device)

        def dense(n: int, k: int) -> Tensor:
            # one expert at a time: the fp32 numbers of all of them at once would not fit
            return torch.stack([randn(g, n, k) * k**-0.5 for _ in range(w.experts)])

        def packed(n: int, k: int) -> tuple[Tensor, Tensor]:
            codes = torch.randint(0, 256, (w.experts, n, k // 2), generator=g, device=g.device, dtype=torch.uint8)
            scales = torch.randint(118, 122, (w.experts, n, k // 32), generator=g, device=g.device, dtype=torch.uint8)
            return codes, scales.view(torch.float8_e8m0fnu)

        if op == "grouped_experts":
            weights: tuple[Tensor, ...] = (dense(2 * w.inner, w.hidden), dense(w.hidden, w.inner))
        else:
            weights = (*packed(2 * w.inner, w.hidden), *packed(w.hidden, w.inner))
        return Inputs((randn(g, rows, w.hidden), weight, counts, *weights), {"limit": 10.0})

    return Case(op, f"{op} T={tokens}", tokens * w.active, make, experts_part, tokens > 1000, False)


def index_part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
    """A few queries of a call of index_topk."""
    q, weight, keys, table, cu, start = inputs.args
    offsets, positions, owner = single(cu, start, tokens)
    args = (q[list(tokens)].cpu(), weight[list(tokens)].cpu(), keys.cpu(), table[owner].cpu(), offsets, positions)
    return Inputs(args, dict(inputs.kwargs)), lambda found: [found[list(tokens)].cpu()]


def index(w: Widths, batch: int, new: int, context: int, packed: bool) -> Case:
    """The choice among the entries (ratio 4) of a context, from bf16 keys or FP8 keys with a power of two each."""
    ratio = 2 if w is TINY else 4

    def keys(g: torch.Generator) -> Callable[[int], Tensor]:
        if not packed:
            return lambda blocks: randn(g, blocks, BLOCK, w.index_width)
        return lambda blocks: _packed_keys(g, blocks, w.index_width)

    def make(g: torch.Generator) -> Inputs:
        cache, table = pool(g, batch, max(context // ratio, 1), keys(g))
        cu, start = batch_of(g, batch, new, context)
        tokens = batch * new
        weight = randn(g, tokens, w.index_heads, dtype=torch.float32)
        return Inputs((randn(g, tokens, w.index_heads, w.index_width), weight, cache, table, cu, start), {"ratio": ratio, "topk": w.topk})

    name = f"index{' fp8 keys' if packed else ''} {'prefill' if new > 1 else 'decode'} T={batch * new} context={context}"
    return Case("index_topk", name, batch * new, make, index_part, new > 1, False)


def _packed_keys(g: torch.Generator, blocks: int, width: int) -> Tensor:
    """Finite e4m3 codes of both signs and a scale of 2^-4 to 2^-1 behind them, a block at a time."""
    code = torch.randint(0, 120, (blocks, BLOCK * width), generator=g, device=g.device, dtype=torch.uint8)
    sign = torch.randint(0, 2, code.shape, generator=g, device=g.device, dtype=torch.uint8) * 128
    exponent = torch.randint(-4, 0, (blocks, BLOCK), generator=g, device=g.device).float()
    return torch.cat((code + sign, torch.exp2(exponent).view(torch.uint8).view(blocks, -1)), 1).view(blocks, BLOCK, width + 4)
