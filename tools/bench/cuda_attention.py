"""Calls of the core attention that the CUDA bench times, and the list of all cases.

Shapes as in ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.bench.cuda_cases import BLOCK, TINY, Case, Inputs, Widths, batch_of, host, pool, randn, rowwise, single
from tools.bench.cuda_compress import compress
from tools.bench.cuda_experts import experts, index


def attention_part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
    """A few queries of a call of sparse_attention."""
    q, cache, table, sink, cu, start = inputs.args
    offsets, positions, owner = single(cu, start, tokens)
    kwargs = {k: host(v) for k, v in inputs.kwargs.items()}
    if "cmp_table" in kwargs:
        kwargs["cmp_table"] = kwargs["cmp_table"][owner]
    if "cmp_index" in kwargs:
        kwargs["cmp_index"] = kwargs["cmp_index"][list(tokens)]
    args = (q[list(tokens)].cpu(), cache.cpu(), table[owner].cpu(), sink.cpu(), offsets, positions)
    return Inputs(args, kwargs), lambda found: [found[list(tokens)].cpu()]


def attention(w: Widths, kind: str, batch: int, new: int, context: int, packed: bool = False) -> Case:
    """Window only ("swa"), chosen entries ("csa", ratio 4) or all entries ("hca", ratio 128)."""
    ratio = {"swa": 0, "csa": 4, "hca": 128}[kind]
    if w is TINY and ratio:
        ratio = {4: 2, 128: 4}[ratio]
    tokens = batch * new

    def rows(g: torch.Generator) -> Callable[[int], Tensor]:
        if not packed:
            return lambda blocks: randn(g, blocks, BLOCK, w.channels)
        from backends.cuda_triton.attention import row_bytes

        return lambda blocks: _packed_rows(g, blocks, w.channels, 2 * w.pairs, row_bytes(w.channels, 2 * w.pairs))

    def make(g: torch.Generator) -> Inputs:
        cache, table = pool(g, batch, context, rows(g)) if context <= 4096 else _window_pool(g, batch, new, context, w.window, rows(g))
        cu, start = batch_of(g, batch, new, context)
        kwargs: dict[str, Any] = {"scale": w.channels**-0.5, "window": w.window}
        if ratio:
            entries = max(context // ratio, 1)
            kwargs["cmp_cache"], kwargs["cmp_table"] = pool(g, batch, entries, rows(g))
            kwargs["ratio"] = ratio
        if kind == "csa":
            seen = torch.arange(context - new, context, device=g.device).repeat(batch).add(1) // ratio
            score = torch.rand(tokens, entries, generator=g, device=g.device) if tokens * entries <= 1 << 28 else None
            kwargs["cmp_index"] = _chosen(g, seen, min(w.topk, entries), score, w.topk)
        return Inputs((randn(g, tokens, w.heads, w.channels), cache, table, randn(g, w.heads, dtype=torch.float32), cu, start), kwargs)

    name = f"{kind}{' packed' if packed else ''} {'prefill' if new > 1 else 'decode'} T={tokens} context={context}"
    return Case("sparse_attention", name, tokens, make, attention_part, new > 1, False)


def _packed_rows(g: torch.Generator, blocks: int, channels: int, rotary: int, width: int) -> Tensor:
    """Packed rows of random finite values: e4m3 codes, bf16 channels near 1 and scales near 1."""
    cache = torch.randint(0, 120, (blocks, BLOCK * width), generator=g, device=g.device, dtype=torch.uint8)
    values = channels + rotary
    rotary_part = cache[:, : BLOCK * values].view(blocks, BLOCK, values)[:, :, channels - rotary :]
    ones = randn(g, blocks, BLOCK, rotary)
    rotary_part.copy_(ones.view(torch.uint8))
    cache[:, BLOCK * values :] = torch.randint(118, 122, (blocks, BLOCK * (width - values)), generator=g, device=g.device, dtype=torch.uint8)
    return cache.view(blocks, BLOCK, width)


def _window_pool(
    g: torch.Generator, batch: int, new: int, context: int, window: int, make: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """A window cache of a long context: blocks behind the window of the first new token are not stored."""
    each = -(-context // BLOCK)
    first = max(context - new - window, 0) // BLOCK
    stored = each - first
    table = torch.zeros(batch, each, dtype=torch.int32, device=g.device)
    table[:, first:] = (torch.randperm(batch * stored, generator=g, device=g.device).view(batch, stored) + 1).int()
    return make(batch * stored + 1), table


def _chosen(g: torch.Generator, seen_T: Tensor, k: int, score_TN: Tensor | None, width: int) -> Tensor:
    """Random distinct visible entries of every token, -1 behind the last."""
    tokens = seen_T.shape[0]
    index = torch.full((tokens, width), -1, dtype=torch.int32, device=g.device)
    if score_TN is None:
        # every token sees far more than it takes: one stride per token gives distinct entries without drawing for each
        step = (seen_T // k).clamp(min=1)
        index[:, :k] = (torch.arange(k, device=g.device)[None, :] * step[:, None] + step[:, None] // 2).int()
        return index
    hidden = torch.arange(score_TN.shape[1], device=g.device)[None, :] >= seen_T[:, None]
    value, best = score_TN.masked_fill(hidden, -1.0).topk(k)
    index[:, :k] = torch.where(value >= 0, best, -1).int()
    return index


def cases(w: Widths, dry: bool) -> list[Case]:
    """Every measurement, the most telling first."""
    if dry:
        return [
            *rowwise(w, 3, False),
            *rowwise(w, 5, True),
            *(attention(w, kind, 2, 1, 40) for kind in ("swa", "csa", "hca")),
            attention(w, "csa", 1, 5, 40),
            attention(w, "csa", 1, 3, 6000),
            attention(w, "csa", 2, 1, 40, packed=True),
            index(w, 2, 1, 40, False),
            index(w, 1, 5, 200, True),
            compress(w, 3, 1, 4),
            compress(w, 1, 9, 128),
            experts(w, "grouped_experts", 3),
            experts(w, "grouped_experts_fp4", 3),
        ]
    found = [attention(w, "csa", batch, 1, context) for batch in (1, 32, 128) for context in (4096, 131072)]
    found += [attention(w, "csa", 1, 4096, 4096), index(w, 1, 1, 131072, False), index(w, 128, 1, 131072, True), index(w, 1, 4096, 4096, True)]
    found += [experts(w, "grouped_experts_fp4", tokens) for tokens in (1, 32, 128, 4096)]
    found += [compress(w, batch, new, ratio) for batch, new in ((1, 1), (128, 1), (1, 4096)) for ratio in (4, 128)]
    found += [c for tokens in (1, 128, 4096) for c in rowwise(w, tokens, tokens > 1000)]
    found += [attention(w, "csa", 128, 1, 131072, packed=True), attention(w, "csa", 1, 1, 1 << 20), attention(w, "hca", 1, 1, 1 << 20)]
    found += [index(w, 1, 1, 1 << 20, packed) for packed in (False, True)]
    found += [attention(w, "hca", 128, 1, 131072), attention(w, "hca", 1, 4096, 131072), index(w, 1, 4096, 131072, True)]
    found += [experts(w, "grouped_experts", tokens) for tokens in (1, 128, 4096)]
    for batch in (1, 32, 128):
        found += [attention(w, "swa", batch, 1, 4096), index(w, batch, 1, 4096, True)]
    found += [attention(w, "swa", 1, 4096, 4096), attention(w, "csa", 1, 4096, 131072), *rowwise(w, 32, False)]
    return found
