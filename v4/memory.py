"""Memory for large parameters in huge pages where the system has them: filled with few page faults, read with few misses of the TLB."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes from which on a tensor gets pages of its own: the usual size of a huge page."""


def uninitialised(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor like torch.empty's. A large one lies in huge pages where the system gives them, and goes back to it when freed."""
    size = prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
