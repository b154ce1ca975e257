"""Grouped experts over packed FP4 weights: rows laid out in tiles, gate and up with the clamped SwiGLU behind them, and the way back.

A weight is the first operand of its product: decoded in registers, it needs no way through shared memory. Sums are therefore transposed, and
so are rows between the kernels: each tile of them is stored channels first, [channels, M]. Columns of a tile past its last row hold
anything; a column meets no other one.

Shapes: A rows sorted by expert, M rows of a tile (all of one expert), D width, I inner width, N columns of a program, K channels of a step,
E experts padded to a power of two.
"""

import triton
import triton.language as tl

from backends.cuda_triton.kernels.experts import tile_of


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
    x_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    QUANTIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Channels of block program_id(0) of the rows of tile program_id(1), channels first; rounded to FP8 per 128 channels if asked for."""
    tile = tl.program_id(1)
    _, first, rows = tile_of(tile, counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        row_M = first + tl.arange(0, BLOCK_M)
        channel_K = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside_MK = (tl.arange(0, BLOCK_M) < rows)[:, None] & (channel_K < width)[None, :]
        x_MK = tl.load(x_ptr + row_M.to(tl.int64)[:, None] * width + channel_K[None, :], mask=inside_MK, other=0.0)
        if QUANTIZE:
            x_MGK = tl.reshape(x_MK.to(tl.float32), (BLOCK_M, BLOCK // 128, 128))
            x_MK = tl.reshape(_fp8_steps(x_MGK, 2), (BLOCK_M, BLOCK)).to(tl.bfloat16)
        target_KM = out_ptr + tile.to(tl.int64) * width * BLOCK_M + channel_K[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(target_KM, tl.trans(x_MK), mask=(channel_K < width)[:, None])


@triton.jit
def _product(
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_N: tl.tensor,
    valid_N: tl.tensor,
    x_ptr: tl.tensor,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """W x [N, M] over DEPTH channels: rows row_N of packed weights, with an e8m0 byte per 32 channels, and a tile [DEPTH, M] of x."""
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # bytes are counted, since what is known of a counter's divisors is lost in a division
    for byte in range(0, DEPTH // 2, BLOCK_K // 2):
        byte_K = byte + tl.arange(0, BLOCK_K // 2)
        group_G = byte // 16 + tl.arange(0, BLOCK_K // 32)
        channel_K = byte * 2 + tl.arange(0, BLOCK_K)
        at_KM = channel_K[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        inside_NK, inside_NG = valid_N[:, None], valid_N[:, None]
        if DEPTH % BLOCK_K:
            inside_NK = inside_NK & (byte_K < DEPTH // 2)[None, :]
            inside_NG = inside_NG & (group_G < DEPTH // 32)[None, :]
            x_KM = tl.load(x_ptr + at_KM, mask=(channel_K < DEPTH)[:, None], other=0.0)
        else:
            x_KM = tl.load(x_ptr + at_KM)
        code_NK = tl.load(code_ptr + row_N[:, None] * (DEPTH // 2) + byte_K[None, :], mask=inside_NK, other=0)
        scale_NG = tl.load(scale_ptr + row_N[:, None] * (DEPTH // 32) + group_G[None, :], mask=inside_NG, other=0)
        sum_NM = tl.dot_scaled(code_NK, scale_NG, "e2m1", x_KM, None, "bf16", sum_NM, fast_math=True)
    return sum_NM


@triton.jit
def gate_up(
    x_ptr: tl.tensor,
    row_weight_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    w13_ptr: tl.tensor,
    s13_ptr: tl.tensor,
    h_ptr: tl.tensor,
    experts: tl.tensor,
    inner: tl.tensor,
    limit: tl.tensor,
    DEPTH: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """h = silu(min(gate, limit)) * clamp(up) * row_weight for N columns (program_id(0)) of one tile of rows (program_id(1)).

    With QUANTIZE, where BLOCK_N is the group of 128, h is rounded to FP8.
    """
    tile = tl.program_id(1)
    expert, first, rows = tile_of(tile, counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_N = column_N < inner
        # gate and up are the halves of one product: twice the scales a step, enough of them for each thread to read asynchronously
        place_R = tl.arange(0, 2 * BLOCK_N)
        column_R = tl.program_id(0) * BLOCK_N + place_R % BLOCK_N
        row_R = expert.to(tl.int64) * (2 * inner) + column_R + tl.where(place_R < BLOCK_N, 0, inner)
        x_ptr += tile.to(tl.int64) * (DEPTH * BLOCK_M)
        both_RM = _product(w13_ptr, s13_ptr, row_R, column_R < inner, x_ptr, DEPTH, BLOCK_M, 2 * BLOCK_N, BLOCK_K)
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(both_RM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        gate_NM = tl.minimum(gate_NM, limit)
        up_NM = tl.minimum(tl.maximum(up_NM, -limit), limit)
        weight_M = tl.load(row_weight_ptr + first + tl.arange(0, BLOCK_M), mask=tl.arange(0, BLOCK_M) < rows, other=0.0)
        h_NM = gate_NM * tl.sigmoid(gate_NM) * up_NM * weight_M[None, :]
        if QUANTIZE:
            h_NM = _fp8_steps(tl.where(valid_N[:, None], h_NM, 0.0), 0)
        target_NM = h_ptr + tile.to(tl.int64) * inner * BLOCK_M + column_N[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(target_NM, h_NM.to(tl.bfloat16), mask=valid_N[:, None])


@triton.jit
def round_tiles(
    h_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    experts: tl.tensor,
    inner: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """h of 128 channels (program_id(0)) of one tile of rows (program_id(1)) rounded to FP8 in place."""
    tile = tl.program_id(1)
    _, _, rows = tile_of(tile, counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        column_N = tl.program_id(0) * 128 + tl.arange(0, 128)
        at_NM = h_ptr + tile.to(tl.int64) * inner * BLOCK_M + column_N[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        h_NM = tl.load(at_NM, mask=(column_N < inner)[:, None], other=0.0).to(tl.float32)
        tl.store(at_NM, _fp8_steps(h_NM, 0).to(tl.bfloat16), mask=(column_N < inner)[:, None])


@triton.jit
def down(
    h_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    y_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y = w2 h for N of the D columns (program_id(0)) of one tile of rows (program_id(1))."""
    tile = tl.program_id(1)
    expert, first, rows = tile_of(tile, counts_ptr, experts, BLOCK_M, EXPERTS)
    if rows > 0:
        column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_N = column_N < width
        weight_row_N = expert.to(tl.int64) * width + column_N
        h_ptr += tile.to(tl.int64) * (DEPTH * BLOCK_M)
        y_NM = _product(w2_ptr, s2_ptr, weight_row_N, valid_N, h_ptr, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K)
        row_M = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        target_MN = y_ptr + row_M[:, None] * width + column_N[None, :]
        tl.store(target_MN, tl.trans(y_NM).to(tl.bfloat16), mask=(tl.arange(0, BLOCK_M) < rows)[:, None] & valid_N[None, :])
