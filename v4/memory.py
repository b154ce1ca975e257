"""Host memory for weights in large pages: products that stream gigabytes of weights stall less on address translation."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page; smaller tensors take ordinary memory."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised host tensor, in large pages where the system grants them on request (Linux), else as torch allocates."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    region = mmap.mmap(-1, size + PAGE)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without large pages
        return torch.empty(shape, dtype=dtype)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    skip = -whole.data_ptr() % PAGE
    return whole[skip : skip + size].view(dtype).view(shape)
