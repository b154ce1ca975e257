"""Finding tokens and rows of ragged, paged batches inside kernels.

Shapes: B sequences padded to a power of two; cu int32 [B + 1], start int32 [B]; tables int32 [B, blocks] of P rows a block.
"""

import triton
import triton.language as tl


@triton.jit
def token_place(token: tl.tensor, cu_ptr: tl.tensor, start_ptr: tl.tensor, batch: tl.tensor, BATCH: tl.constexpr) -> tl.tensor:
    """(sequence, absolute position) of a token: sequences that end at or before it are counted, empty ones included."""
    sequence_B = tl.arange(0, BATCH)
    end_B = tl.load(cu_ptr + 1 + sequence_B, mask=sequence_B < batch, other=2147483647)
    sequence = tl.sum((end_B <= token).to(tl.int32), axis=0)
    return sequence, tl.load(start_ptr + sequence) + token - tl.load(cu_ptr + sequence)


@triton.jit
def row_offset(
    row_N: tl.tensor,
    valid_N: tl.tensor,
    table_ptr: tl.tensor,
    block_stride: tl.tensor,
    row_stride: tl.tensor,
    PER_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Element offsets int64 of logical rows of one sequence, whose part of the table begins at table_ptr; 0 where not valid."""
    safe_N = tl.where(valid_N, row_N, 0)
    block_N = tl.load(table_ptr + safe_N // PER_BLOCK, mask=valid_N, other=0).to(tl.int64)
    return block_N * block_stride + (safe_N % PER_BLOCK).to(tl.int64) * row_stride


@triton.jit
def row_unit(
    row_N: tl.tensor,
    valid_N: tl.tensor,
    table_ptr: tl.tensor,
    block_units: tl.tensor,
    row_units: tl.tensor,
    PER_BLOCK: tl.constexpr,
) -> tl.tensor:
    """As row_offset, but int32 and counted in units that rows and blocks are multiples of: half the registers until it is used."""
    safe_N = tl.where(valid_N, row_N, 0)
    block_N = tl.load(table_ptr + safe_N // PER_BLOCK, mask=valid_N, other=0)
    return block_N * block_units + safe_N % PER_BLOCK * row_units
