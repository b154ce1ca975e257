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


ADDRESSES = frozenset(index for pairs in (*TABLES.values(), SLOTS.values()) for _, index in pairs)
"""Arguments that are renumbered when caches are cut."""


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


def _kept(used: set[int], total: int) -> list[int]:
    return sorted({b for block in used for b in (block - 1, block, block + 1) if 0 <= b < total} | {0, total - 1})


def _like(values: list[int], t: Tensor) -> Tensor:
    return torch.tensor(values, dtype=t.dtype, device=t.device).view(t.shape)


def _cut(cache: Tensor, cache_name: str, index: Tensor, index_name: str, *, slots: bool) -> Cut | None:
    """The cut of one cache addressed by its blocks (0: none) or by flat slots (-1: none); None for addresses outside of it."""
    addresses, rows, none = index.reshape(-1).tolist(), cache.shape[1] if slots else 1, -1 if slots else 0
    total = cache.shape[0]
    if not total or not rows or any(not none <= a < total * rows for a in addresses):
        return None
    kept = _kept({a // rows for a in addresses if a != none}, total)
    place = {block: i for i, block in enumerate(kept)}
    renumbered = [place[a // rows] * rows + a % rows if a >= 0 else a for a in addresses]
    return Cut(cache_name, index_name, torch.tensor(kept), _like(renumbered, index))


def cuts(op: str, arguments: Mapping[str, Any]) -> list[Cut]:
    """How the caches of a call can be cut; a cache whose addresses leave it is not cut, so that the fault stays visible."""
    found = []
    for cache_name, table_name in TABLES.get(op, ()):
        cache, table = arguments.get(cache_name), arguments.get(table_name)
        if cache is not None and table is not None:
            found.append(_cut(cache, cache_name, table, table_name, slots=False))
    if op in SLOTS:
        cache_name, slots_name = SLOTS[op]
        cache = arguments[cache_name]
        found.append(_cut(cache, cache_name, arguments[slots_name], slots_name, slots=True))
    return [cut for cut in found if cut is not None]
