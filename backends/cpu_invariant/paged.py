"""Ops over paged caches: one query at a time on copies of the blocks it sees, so that physical places do not matter.

Shapes: caches [blocks, P, W]; a table row [n] holds the physical block of each logical one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.cpu_invariant.rows import fresh, register
from ops.paged import tokens

_ONE = torch.tensor([0, 1], dtype=torch.int32)


def _position(p: int) -> Tensor:
    return torch.tensor([p], dtype=torch.int32)


def compact(cache: Tensor, table_row: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Copy of the logical `blocks` (ascending, int64) side by side, and the table [1, n] that finds them there.

    Logical blocks that are not among them point at the first copy: an implementation may read and mask them.
    """
    copy = cache.new_empty((len(blocks) + 1, *cache.shape[1:]))
    copy[0].zero_()
    copy[1:] = cache[table_row[blocks].long()]
    table = torch.ones(1, len(table_row), dtype=torch.int32)
    table[0, blocks] = torch.arange(1, len(blocks) + 1, dtype=torch.int32)
    return copy, table


def _blocks(cache: Tensor, first: int, end: int) -> Tensor:
    """Logical blocks of the rows first..end-1."""
    per_block = cache.shape[1]
    return torch.arange(first // per_block, -(-end // per_block) if end > first else first // per_block)


def _sparse_attention(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        q_THC: Tensor,
        window_cache: Tensor,
        window_table: Tensor,
        sink_H: Tensor,
        cu_seqlens: Tensor,
        start_pos: Tensor,
        *,
        scale: float,
        window: int,
        cmp_cache: Tensor | None = None,
        cmp_table: Tensor | None = None,
        cmp_index: Tensor | None = None,
        ratio: int = 0,
    ) -> Tensor:
        out = torch.empty_like(q_THC)
        for b, t, p in tokens(cu_seqlens, start_pos):
            near, near_table = compact(window_cache, window_table[b], _blocks(window_cache, max(p - window + 1, 0), p + 1))
            kwargs: dict[str, Any] = {"scale": scale, "window": window}
            if cmp_cache is not None and cmp_table is not None:
                index = None if cmp_index is None else fresh(cmp_index, t, t + 1)
                if index is None:
                    seen = _blocks(cmp_cache, 0, (p + 1) // ratio)
                else:
                    seen = (index[index >= 0].long() // cmp_cache.shape[1]).unique()
                if len(seen):
                    entries, table = compact(cmp_cache, cmp_table[b], seen)
                    kwargs.update(cmp_cache=entries, cmp_table=table, cmp_index=index, ratio=ratio)
            out[t : t + 1] = fn(fresh(q_THC, t, t + 1), near, near_table, sink_H, _ONE, _position(p), **kwargs)
        return out

    return call


def _index_topk(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        q_THd: Tensor,
        w_TH: Tensor,
        key_cache: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        start_pos: Tensor,
        *,
        ratio: int,
        topk: int,
    ) -> Tensor:
        index = torch.empty((q_THd.shape[0], topk), dtype=torch.int32)
        for b, t, p in tokens(cu_seqlens, start_pos):
            keys, table = compact(key_cache, block_table[b], _blocks(key_cache, 0, (p + 1) // ratio))
            query, weight = fresh(q_THd, t, t + 1), fresh(w_TH, t, t + 1)
            index[t : t + 1] = fn(query, weight, keys, table, _ONE, _position(p), ratio=ratio, topk=topk)
        return index

    return call


register("sparse_attention", _sparse_attention)
register("index_topk", _index_topk)
