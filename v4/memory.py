"""Memory for parameters: filled in pages of the usual size, then offered to the system for huge ones, which are read with fewer misses of the TLB.

Asking for huge pages before the filling made a new process wait: on a virtual machine whose host takes free memory back each of them is fetched
and cleared twice (docs/performance.md). Offered afterwards, they are joined in the background as the system finds time.
"""

from __future__ import annotations

import mmap
from math import prod
from weakref import ref

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes from which on a tensor gets pages of its own: the usual size of a huge page. Smaller ones lie side by side in a chunk."""

CHUNK = 4 * LARGE
_ALIGNED = 64


def _pages(size: int) -> mmap.mmap | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Memory:
    """Gives out tensors; pages go back to the system when the last tensor in them is freed."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = CHUNK
        self._given: list[ref[mmap.mmap]] = []

    def _new(self, size: int) -> mmap.mmap | None:
        if (pages := _pages(size)) is not None:
            self._given.append(ref(pages))
        return pages

    def offer(self) -> None:
        """Let the system join the pages of all tensors given out so far into huge ones. Call it when they are filled."""
        for given in self._given:
            if (pages := given()) is None:
                continue
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages
                break
        self._given.clear()

    def uninitialised(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor like torch.empty's, with a storage of its own."""
        size = prod(shape) * dtype.itemsize
        if size >= LARGE:
            pages, at = self._new(size), 0
        else:
            if self._used + size > CHUNK:
                self._chunk, self._used = self._new(CHUNK), 0
            pages, at = self._chunk, self._used
            self._used += -(-size // _ALIGNED) * _ALIGNED
        if pages is None or not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=at).view(dtype).view(shape)
