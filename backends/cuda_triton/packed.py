"""Rows quantised and written into packed caches, in one kernel and without a value read on the host. Shapes as in ops/cache.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC, kernels, power
from ops.cache import cache_insert_fp8, fp8_row_parts, index_insert_fp4, index_insert_fp8

WIDEST = 4096
"""Channels of a row up to which one program holds it."""

_GROUP = 64
"""Channels of an attention row that share a scale."""


def _rows_fit(cache: Tensor, rows: Tensor, slots: Tensor, width: int) -> bool:
    if cache.dim() != 3 or cache.dtype != torch.uint8 or rows.dim() != 2 or rows.dtype not in FLOATS or not rows.numel():
        return False
    if cache.shape[2] != width or cache.stride(2) != 1 or (cache.shape[1] > 1 and cache.stride(1) != width) or rows.shape[1] > WIDEST:
        return False
    listed = slots.dtype == torch.int64 and slots.shape == rows.shape[:1] and slots.is_contiguous()
    return listed and rows.is_contiguous()


def _aligned(cache: Tensor, *offsets: int, size: int) -> bool:
    """Whether everything stored as numbers of `size` bytes starts at a multiple of it."""
    return all(n % size == 0 for n in (cache.data_ptr(), cache.stride(0), *offsets))


def _fp8_fits(cache: Tensor, rows_RC: Tensor, slots: Tensor, *, rope_dim: int = 64) -> bool:
    if rows_RC.dim() != 2 or not 0 <= rope_dim < rows_RC.shape[1]:
        return False
    values, scales = fp8_row_parts(rows_RC.shape[1], rope_dim)
    return _rows_fit(cache, rows_RC, slots, values + scales) and _aligned(cache, values, rows_RC.shape[1] - rope_dim, size=2)


@cache_insert_fp8.implement("cuda_triton", soc=SOC, needs=[NEED], when=_fp8_fits, note=f"contiguous rows of up to {WIDEST} channels")
def _cache_insert_fp8(cache: Tensor, rows_RC: Tensor, slots: Tensor, *, rope_dim: int = 64) -> None:
    channels = rows_RC.shape[1]
    values, scales = fp8_row_parts(channels, rope_dim)
    kernels("packed").insert_fp8[(rows_RC.shape[0],)](
        cache, rows_RC, slots, channels, cache.shape[1], cache.stride(0), NOPE=channels - rope_dim, VALUES=values, SCALES=scales,
        INDEX=False, GROUPS=power(scales), GROUP=_GROUP, BLOCK_R=power(rope_dim, 16), num_warps=1,
    )  # fmt: skip


def _index_fp8_fits(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> bool:
    if rows_R128.dim() != 2 or cache.dim() != 3:
        return False
    d = rows_R128.shape[1]
    return _rows_fit(cache, rows_R128, slots, d + 4) and _aligned(cache, cache.shape[1] * d, size=4)


@index_insert_fp8.implement("cuda_triton", soc=SOC, needs=[NEED], when=_index_fp8_fits, note=f"contiguous rows of up to {WIDEST} channels")
def _index_insert_fp8(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    d = rows_R128.shape[1]
    kernels("packed").insert_fp8[(rows_R128.shape[0],)](
        cache, rows_R128, slots, d, cache.shape[1], cache.stride(0), NOPE=d, VALUES=d, SCALES=4, INDEX=True, GROUPS=1, GROUP=power(d, 16),
        BLOCK_R=16, num_warps=1,
    )  # fmt: skip


def _index_fp4_fits(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> bool:
    if rows_R128.dim() != 2 or rows_R128.shape[1] % 32:
        return False
    return _rows_fit(cache, rows_R128, slots, rows_R128.shape[1] // 2 + rows_R128.shape[1] // 32)


@index_insert_fp4.implement("cuda_triton", soc=SOC, needs=[NEED], when=_index_fp4_fits, note=f"contiguous rows of up to {WIDEST} channels")
def _index_insert_fp4(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    d = rows_R128.shape[1]
    kernels("packed").insert_fp4[(rows_R128.shape[0],)](
        cache, rows_R128, slots, d, cache.shape[1], cache.stride(0), GROUPS=power(d // 32), num_warps=1
    )
