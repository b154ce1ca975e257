"""Rows written into paged caches.

Shapes: cache [blocks, P rows, W], rows [R, W], slots int64 [R] = block * P + row, -1 skipped.
"""

import triton
import triton.language as tl


@triton.jit
def insert(
    cache_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    width: tl.tensor,
    block_rows: tl.tensor,
    block_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Copy row program_id(0) to its slot; program_id(1) takes BLOCK of its elements."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        column_W = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside_W = column_W < width
        value_W = tl.load(rows_ptr + row * width + column_W, mask=inside_W)
        target = slot // block_rows * block_stride + slot % block_rows * width
        tl.store(cache_ptr + target + column_W, value_W, mask=inside_W)
