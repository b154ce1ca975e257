"""Grouped experts over bf16 weights: gate and up with the clamped SwiGLU behind them, and the way back.

Shapes: A rows sorted by expert, M rows of a program (all of one expert), D width, I inner width, N columns of a program, K channels of a
step, E experts padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(
    tile: tl.tensor, counts_ptr: tl.tensor, experts: tl.tensor, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr
) -> tl.tensor:
    """(expert, first row, rows) of a tile of rows; 0 rows for tiles past the last."""
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.load(counts_ptr + expert_E, mask=expert_E < experts, other=0).to(tl.int32)
    tiles_E = tl.cdiv(count_E, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles_E, axis=0) <= tile).to(tl.int32), axis=0)
    before_E = expert_E < expert
    skipped = (tile - tl.sum(tl.where(before_E, tiles_E, 0), axis=0)) * BLOCK_M
    first = tl.sum(tl.where(before_E, count_E, 0), axis=0) + skipped
    count = tl.sum(tl.where(expert_E == expert, count_E, 0), axis=0) - skipped
    return expert, first, tl.where(expert < experts, tl.minimum(count, BLOCK_M), 0)


@triton.jit
def _dense_tile(
    weight_ptr: tl.tensor, row_N: tl.tensor, valid_N: tl.tensor, first: tl.tensor, depth: tl.tensor, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """A tile [N, K] of bf16 weights."""
    at_K = first + tl.arange(0, BLOCK_K)
    return tl.load(weight_ptr + row_N[:, None] * depth + at_K[None, :], mask=valid_N[:, None] & (at_K < depth)[None, :], other=0.0)


@triton.jit
def gate_up(
    x_ptr: tl.tensor,
    row_weight_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    w13_ptr: tl.tensor,
    h_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    limit: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """h = silu(min(gate, limit)) * clamp(up) * row_weight for one tile of rows (program_id(0)) and N columns (program_id(1))."""
    expert, first, rows = tile_of(tl.program_id(0), counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        row_M = first + tl.arange(0, BLOCK_M)
        valid_M = tl.arange(0, BLOCK_M) < rows
        x_row_M = x_ptr + row_M.to(tl.int64) * width
        column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_N = column_N < inner
        gate_row_N = expert.to(tl.int64) * (2 * inner) + column_N
        up_row_N = gate_row_N + inner
        gate_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            at_K = k + tl.arange(0, BLOCK_K)
            inside_MK = valid_M[:, None] & (at_K < width)[None, :]
            x_MK = tl.load(x_row_M[:, None] + at_K[None, :], mask=inside_MK, other=0.0)
            gate_MN = tl.dot(x_MK, tl.trans(_dense_tile(w13_ptr, gate_row_N, valid_N, k, width, BLOCK_K)), gate_MN)
            up_MN = tl.dot(x_MK, tl.trans(_dense_tile(w13_ptr, up_row_N, valid_N, k, width, BLOCK_K)), up_MN)
        gate_MN = tl.minimum(gate_MN, limit)
        up_MN = tl.minimum(tl.maximum(up_MN, -limit), limit)
        weight_M = tl.load(row_weight_ptr + row_M, mask=valid_M, other=0.0)
        h_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN * weight_M[:, None]
        h_row_M = h_ptr + row_M.to(tl.int64) * inner
        tl.store(h_row_M[:, None] + column_N[None, :], h_MN.to(tl.bfloat16), mask=valid_M[:, None] & valid_N[None, :])


@triton.jit
def down(
    h_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    y_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y = w2 h for one tile of rows (program_id(0)) and N of the D columns (program_id(1))."""
    expert, first, rows = tile_of(tl.program_id(0), counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        row_M = first + tl.arange(0, BLOCK_M)
        valid_M = tl.arange(0, BLOCK_M) < rows
        h_row_M = h_ptr + row_M.to(tl.int64) * inner
        column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_N = column_N < width
        weight_row_N = expert.to(tl.int64) * width + column_N
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            at_K = k + tl.arange(0, BLOCK_K)
            inside_MK = valid_M[:, None] & (at_K < inner)[None, :]
            h_MK = tl.load(h_row_M[:, None] + at_K[None, :], mask=inside_MK, other=0.0)
            y_MN = tl.dot(h_MK, tl.trans(_dense_tile(w2_ptr, weight_row_N, valid_N, k, inner, BLOCK_K)), y_MN)
        target_MN = y_ptr + row_M.to(tl.int64)[:, None] * width + column_N[None, :]
        tl.store(target_MN, y_MN.to(tl.bfloat16), mask=valid_M[:, None] & valid_N[None, :])
