"""Paged caches and ragged queries as the attention and indexer ops document them."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import needed, require, require_dtype, require_shape


def rows_of(op: str, cache: Tensor, table: Tensor, request: int, positions: Tensor) -> Tensor:
    """Rows [n, ...] of a cache [blocks, block_size, 1, ...] at positions of a request; table int32 [B, max_blocks]."""
    size = cache.shape[1]
    if not positions.numel():
        return cache[:0, 0, 0]
    column = positions // size
    require(
        int(column.max()) < table.shape[1],
        op,
        f"position {int(positions.max())}",
        f"inside the {table.shape[1]} blocks of the table",
    )
    blocks = table[request, column].long()
    require(
        bool(((blocks >= 0) & (blocks < cache.shape[0])).all()),
        op,
        f"blocks {blocks.tolist()[:8]}",
        f"0 <= block < {cache.shape[0]}",
    )
    return cache[blocks, positions % size, 0]


def check_cache(op: str, name: str, cache: Tensor, width: int | None, *dtypes: torch.dtype) -> None:
    """Refuse a cache that is not [blocks, block_size, 1, width] of one of the types, block_size a multiple of 16 up to 1024."""
    require_dtype(op, name, cache, *dtypes)
    require_shape(op, name, cache, None, None, 1, width)
    require(
        cache.shape[1] % 16 == 0 and 16 <= cache.shape[1] <= 1024,
        op,
        f"{name} with blocks of {cache.shape[1]}",
        "a multiple of 16 up to 1024",
    )


def check_table(op: str, name: str, table: Tensor | None, batch: int) -> Tensor:
    """The block table, refused unless int32 [B, max_blocks]."""
    found = needed(op, name, table)
    require_dtype(op, name, found, torch.int32)
    require_shape(op, name, found, batch, None)
    return found


def requests(op: str, tokens: int, cu_seqlens_q: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """(request, row of q, position) of every query; the last query of a request stands at its length - 1."""
    legal = bool(cu_seqlens_q) and cu_seqlens_q[0] == 0 and cu_seqlens_q == sorted(cu_seqlens_q) and cu_seqlens_q[-1] <= tokens
    require(legal, op, f"cumulative query lengths {cu_seqlens_q}", f"rising from 0 to at most {tokens}")
    require(len(lengths) == len(cu_seqlens_q) - 1, op, f"{len(lengths)} key lengths", f"{len(cu_seqlens_q) - 1}, one per request")
    found = []
    for b, length in enumerate(lengths):
        first, end = cu_seqlens_q[b], cu_seqlens_q[b + 1]
        require(
            length >= end - first,
            op,
            f"length {length} of request {b} with {end - first} queries",
            "lengths that include the new tokens",
        )
        found += [(b, t, length - (end - t)) for t in range(first, end)]
    return found
