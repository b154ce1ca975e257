"""Logical rows of one sequence in a paged cache, read as fp32: views where blocks lie side by side, copies elsewhere.

Shapes: cache [blocks, P, W], rows [n, C] (C = W for float caches), blocks: numpy int32 row of the block table.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.integer]
Decoder = Callable[[Tensor, Tensor], Tensor]


class Rows:
    """Rows by number. `decode(cache, slots)` turns flat slots of a packed cache into fp32 rows; None for a float cache."""

    __slots__ = ("_block_rows", "_blocks", "_cache", "_decode", "_flat")

    def __init__(self, cache: Tensor, blocks: Ints, decode: Decoder | None = None) -> None:
        self._cache, self._blocks, self._decode = cache, blocks, decode
        self._block_rows = cache.shape[1]
        self._flat = cache.view(-1, cache.shape[2]) if decode is None and cache.is_contiguous() else None

    def _there(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self._cache.device)

    def _adjacent(self, used: Ints) -> bool:
        return len(used) == 1 or (int(used[-1]) - int(used[0]) == len(used) - 1 and bool((used[1:] > used[:-1]).all()))

    def is_view(self, low: int, high: int) -> bool:
        """Whether `span` costs nothing: fp32 rows in adjacent blocks."""
        if self._flat is None or self._cache.dtype != torch.float32:
            return False
        return high <= low or self._adjacent(self._blocks[low // self._block_rows : (high - 1) // self._block_rows + 1])

    def span(self, low: int, high: int) -> Tensor:
        """Rows low..high-1, fp32 [high - low, C]; a view of the cache when possible."""
        if self._decode is not None:
            return self.pick(np.arange(low, high))
        if high <= low:
            return self._cache.new_empty((0, self._cache.shape[2]), dtype=torch.float32)
        first = low // self._block_rows
        used = self._blocks[first : (high - 1) // self._block_rows + 1]
        offset = low - first * self._block_rows
        if self._flat is not None and self._adjacent(used):
            offset += int(used[0]) * self._block_rows
            return self._flat[offset : offset + high - low].float()
        if len(used) == 1:
            return self._cache[int(used[0]), offset : offset + high - low].float()
        copied = self._cache.index_select(0, self._there(used))
        return copied.view(-1, self._cache.shape[2])[offset : offset + high - low].float()

    def pick(self, rows: Ints) -> Tensor:
        """The given rows (flat list, none negative), fp32 [len(rows), C]."""
        block = self._blocks[rows // self._block_rows].astype(np.int64)
        inside = rows % self._block_rows
        if self._flat is None and self._decode is None:
            return self._cache[self._there(block), self._there(inside)].float()
        slots = self._there(block * self._block_rows + inside)
        if self._decode is not None:
            return self._decode(self._cache, slots)
        assert self._flat is not None
        return self._flat.index_select(0, slots).float()
