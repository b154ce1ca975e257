"""Grouped experts: gate and up with the clamped SwiGLU behind them, and the way back, over bf16 or packed FP4 weights.

Shapes: A rows sorted by expert, M rows of a program (all of one expert), D width, I inner width, N columns of a program, K depth of a
step, E experts padded to a power of two. FP4: K counts bytes; rows lie with their even channels first, then the odd ones, so that the low
and the high nibbles of a byte tile each have a contiguous tile of rows beside them.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(
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
def _fp8_steps(x_MG: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """x rounded to e4m3 with one power of two over `axis`, 2^ceil(log2(max(amax, 1e-4) / 448)), and back, fp32."""
    top = tl.maximum(tl.max(tl.abs(x_MG), axis=axis, keep_dims=True), 1e-4)
    bits = top.to(tl.int32, bitcast=True)
    # 448 = 1.75 * 2^8: the quotient's exponent is the number's less 8, and one more where the mantissa is above 1.75
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return (x_MG * inverse).to(tl.float8e4nv).to(tl.float32) * scale


@triton.jit
def prepare(
    x_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.tensor, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Row program_id(0), channels of block program_id(1): rounded to FP8 per 128 channels if asked for, even channels first."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + channel, mask=channel < width, other=0.0).to(tl.float32)
    if QUANTIZE:
        x = tl.reshape(_fp8_steps(tl.reshape(x, (BLOCK // 128, 128)), 1), (BLOCK,))
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    pair = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    target = out_ptr + row * width + pair
    tl.store(target, even.to(out_ptr.dtype.element_ty), mask=pair < width // 2)
    tl.store(target + width // 2, odd.to(out_ptr.dtype.element_ty), mask=pair < width // 2)


@triton.jit
def _nibble(code_NK: tl.tensor, scale_NK: tl.tensor) -> tl.tensor:
    """e2m1 codes times their scales, bf16. Exponent and mantissa are put in place as a float 2^126 times too small, which is exact."""
    bits_NK = ((code_NK & 7) << 22) | ((code_NK & 8) << 28)
    return (bits_NK.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale_NK).to(tl.bfloat16)


@triton.jit
def _fp4_tile(
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_N: tl.tensor,
    valid_N: tl.tensor,
    first: tl.tensor,
    bytes_: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(low, high) nibbles of a tile [N, K] of packed weights, decoded; one e8m0 byte per 16 bytes."""
    byte_K = first + tl.arange(0, BLOCK_K)
    inside_NK = valid_N[:, None] & (byte_K < bytes_)[None, :]
    code_NK = tl.load(code_ptr + row_N[:, None] * bytes_ + byte_K[None, :], mask=inside_NK, other=0).to(tl.int32)
    group_G = first // 16 + tl.arange(0, BLOCK_K // 16)
    inside_NG = valid_N[:, None] & (group_G < bytes_ // 16)[None, :]
    scale_NG = tl.load(scale_ptr + row_N[:, None] * (bytes_ // 16) + group_G[None, :], mask=inside_NG, other=0).to(tl.int32)
    scale_NG = (scale_NG << 23).to(tl.float32, bitcast=True)
    scale_NK = tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (BLOCK_N, BLOCK_K // 16, 16)), (BLOCK_N, BLOCK_K))
    return _nibble(code_NK, scale_NK), _nibble(code_NK >> 4, scale_NK)


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
    s13_ptr: tl.tensor,
    h_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    limit: tl.tensor,
    FP4: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """h = silu(min(gate, limit)) * clamp(up) * row_weight for one tile of rows (program_id(0)) and N columns (program_id(1)).

    With FP4 h is stored even channels first; with QUANTIZE, where BLOCK_N is the group of 128, rounded to FP8 before.
    """
    expert, first, rows = _tile(tl.program_id(0), counts_ptr, experts, BLOCK_M, EXPERTS)
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
        depth = width // 2 if FP4 else width
        for k in range(0, depth, BLOCK_K):
            at_K = k + tl.arange(0, BLOCK_K)
            inside_MK = valid_M[:, None] & (at_K < depth)[None, :]
            x_MK = tl.load(x_row_M[:, None] + at_K[None, :], mask=inside_MK, other=0.0)
            if FP4:
                odd_MK = tl.load(x_row_M[:, None] + depth + at_K[None, :], mask=inside_MK, other=0.0)
                low_NK, high_NK = _fp4_tile(w13_ptr, s13_ptr, gate_row_N, valid_N, k, depth, BLOCK_N, BLOCK_K)
                gate_MN = tl.dot(x_MK, tl.trans(low_NK), gate_MN)
                gate_MN = tl.dot(odd_MK, tl.trans(high_NK), gate_MN)
                low_NK, high_NK = _fp4_tile(w13_ptr, s13_ptr, up_row_N, valid_N, k, depth, BLOCK_N, BLOCK_K)
                up_MN = tl.dot(x_MK, tl.trans(low_NK), up_MN)
                up_MN = tl.dot(odd_MK, tl.trans(high_NK), up_MN)
            else:
                gate_MN = tl.dot(x_MK, tl.trans(_dense_tile(w13_ptr, gate_row_N, valid_N, k, depth, BLOCK_K)), gate_MN)
                up_MN = tl.dot(x_MK, tl.trans(_dense_tile(w13_ptr, up_row_N, valid_N, k, depth, BLOCK_K)), up_MN)
        gate_MN = tl.minimum(gate_MN, limit)
        up_MN = tl.minimum(tl.maximum(up_MN, -limit), limit)
        weight_M = tl.load(row_weight_ptr + row_M, mask=valid_M, other=0.0)
        h_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN * weight_M[:, None]
        h_row_M = h_ptr + row_M.to(tl.int64) * inner
        if FP4:
            h_MN = tl.where(valid_N[None, :], h_MN, 0.0)
            if QUANTIZE:
                h_MN = _fp8_steps(h_MN, 1)
            even_MN, odd_MN = tl.split(tl.reshape(h_MN, (BLOCK_M, BLOCK_N // 2, 2)))
            pair_N = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            inside_MN = valid_M[:, None] & (pair_N < inner // 2)[None, :]
            target_MN = h_row_M[:, None] + pair_N[None, :]
            tl.store(target_MN, even_MN.to(tl.bfloat16), mask=inside_MN)
            tl.store(target_MN + inner // 2, odd_MN.to(tl.bfloat16), mask=inside_MN)
        else:
            tl.store(h_row_M[:, None] + column_N[None, :], h_MN.to(tl.bfloat16), mask=valid_M[:, None] & valid_N[None, :])


@triton.jit
def down(
    h_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    y_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    FP4: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y = w2 h for one tile of rows (program_id(0)) and N of the D columns (program_id(1))."""
    expert, first, rows = _tile(tl.program_id(0), counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        row_M = first + tl.arange(0, BLOCK_M)
        valid_M = tl.arange(0, BLOCK_M) < rows
        h_row_M = h_ptr + row_M.to(tl.int64) * inner
        column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_N = column_N < width
        weight_row_N = expert.to(tl.int64) * width + column_N
        y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        depth = inner // 2 if FP4 else inner
        for k in range(0, depth, BLOCK_K):
            at_K = k + tl.arange(0, BLOCK_K)
            inside_MK = valid_M[:, None] & (at_K < depth)[None, :]
            h_MK = tl.load(h_row_M[:, None] + at_K[None, :], mask=inside_MK, other=0.0)
            if FP4:
                odd_MK = tl.load(h_row_M[:, None] + depth + at_K[None, :], mask=inside_MK, other=0.0)
                low_NK, high_NK = _fp4_tile(w2_ptr, s2_ptr, weight_row_N, valid_N, k, depth, BLOCK_N, BLOCK_K)
                y_MN = tl.dot(h_MK, tl.trans(low_NK), y_MN)
                y_MN = tl.dot(odd_MK, tl.trans(high_NK), y_MN)
            else:
                y_MN = tl.dot(h_MK, tl.trans(_dense_tile(w2_ptr, weight_row_N, valid_N, k, depth, BLOCK_K)), y_MN)
        target_MN = y_ptr + row_M.to(tl.int64)[:, None] * width + column_N[None, :]
        tl.store(target_MN, y_MN.to(tl.bfloat16), mask=valid_M[:, None] & valid_N[None, :])
