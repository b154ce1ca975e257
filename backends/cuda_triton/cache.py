"""Rows copied into paged caches. Shapes as in ops/cache.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC, blocks, kernels, power, warps
from ops.cache import cache_insert


def _insert_fits(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> bool:
    if cache.dim() != 3 or rows_RW.dim() != 2 or not rows_RW.numel() or not rows_RW.is_contiguous():
        return False
    _, per_block, width = cache.shape
    together = cache.dtype == rows_RW.dtype and width == rows_RW.shape[1]
    listed = slots.dtype == torch.int64 and slots.shape == rows_RW.shape[:1] and slots.is_contiguous()
    dense = cache.stride(2) == 1 and (per_block == 1 or cache.stride(1) == width)
    return together and listed and dense and cache.dtype in FLOATS


@cache_insert.implement("cuda_triton", soc=SOC, needs=[NEED], when=_insert_fits, note="blocks with contiguous rows")
def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    count, width = rows_RW.shape
    block = min(power(width, 16), 4096)
    kernels("cache").insert[(count, blocks(width, block))](
        cache, rows_RW, slots, width, cache.shape[1], cache.stride(0), BLOCK=block, num_warps=warps(block)
    )
