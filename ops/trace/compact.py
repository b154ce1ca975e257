"""Cutting paged caches to the blocks that a call can reach, so that its recording stays small at any context length.

Block tables and slots are renumbered to match; what the op computes from them stays the same. The null block, the last block and
the neighbours of every block in use are kept as well, so that a write beside its place still shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TABLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "sparse_attention": (("window_cache", "window_table"), ("cmp_cache", "cmp_table")),
    "index_topk": (("key_cache", "block_table"),),
    "compress": (("state", "state_table"),),
}
"""Per op: caches and the block tables that address them."""

SLOTS: Mapping[str, tuple[str, str]] = dict.fromkeys(
    ("cache_insert", "cache_insert_fp8", "index_insert_fp8", "index_insert_fp4"), ("cache", "slots")
)
"""Per op: a cache [blocks, P, W] and the flat slots (block * P + row, -1 for none) written in it."""


@dataclass(frozen=True)
class Cut:
    """Blocks of one cache that are kept, in order, and the argument that addresses them."""

    cache: str
    index: str
    blocks: Tensor
    renumbered: Tensor

    def of(self, cache: Tensor) -> Tensor:
        """A copy of the kept blocks."""
        return cache.index_select(0, self.blocks.to(cache.device))


def _kept(used: Tensor, total: int) -> Tensor:
    near = torch.cat((used - 1, used, used + 1, used.new_tensor([0, total - 1])))
    return near[(near >= 0) & (near < total)].unique()


def _renumber(blocks: Tensor, kept: Tensor) -> Tensor:
    return torch.searchsorted(kept, blocks.contiguous())


def cuts(op: str, arguments: Mapping[str, Any]) -> list[Cut]:
    """How the caches of a call can be cut; a cache whose addresses leave it is not cut, so that the fault stays visible."""
    found = []
    for cache_name, table_name in TABLES.get(op, ()):
        cache, table = arguments.get(cache_name), arguments.get(table_name)
        if cache is None or table is None or not cache.shape[0]:
            continue
        blocks = table.detach().cpu().long()
        if blocks.numel() and (int(blocks.min()) < 0 or int(blocks.max()) >= cache.shape[0]):
            continue
        kept = _kept(blocks[blocks > 0].unique(), cache.shape[0])
        found.append(Cut(cache_name, table_name, kept, _renumber(blocks, kept).to(table.dtype).to(table.device)))
    if op in SLOTS:
        cache_name, slots_name = SLOTS[op]
        cache, slots = arguments[cache_name], arguments[slots_name]
        rows, flat = cache.shape[1], slots.detach().cpu().long()
        if cache.numel() and (not flat.numel() or (int(flat.min()) >= -1 and int(flat.max()) < cache.shape[0] * rows)):
            kept = _kept((flat[flat >= 0] // rows).unique(), cache.shape[0])
            new = torch.where(flat < 0, flat, _renumber(flat.clamp(min=0) // rows, kept) * rows + flat.clamp(min=0) % rows)
            found.append(Cut(cache_name, slots_name, kept, new.to(slots.dtype).to(slots.device)))
    return found
