"""Memory for parameters in huge pages where the system has them: filled with few page faults, read with few misses of the TLB."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes from which on a tensor gets pages of its own: the usual size of a huge page. Smaller ones lie side by side in a chunk."""

CHUNK = 4 * LARGE
_ALIGNED = 64


def _pages(size: int) -> mmap.mmap | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return None
    return pages


class Memory:
    """Gives out tensors; pages go back to the system when the last tensor in them is freed."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = CHUNK

    def uninitialised(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor like torch.empty's, with a storage of its own."""
        size = prod(shape) * dtype.itemsize
        if size >= LARGE:
            pages, at = _pages(size), 0
        else:
            if self._used + size > CHUNK:
                self._chunk, self._used = _pages(CHUNK), 0
            pages, at = self._chunk, self._used
            self._used += -(-size // _ALIGNED) * _ALIGNED
        if pages is None or not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=at).view(dtype).view(shape)
