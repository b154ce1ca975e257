"""Rows written into packed caches: quantised in registers, codes and scales stored where the format has them.

Shapes: cache uint8 [blocks, P rows, W bytes] whose blocks hold P rows of codes, then P rows of scales; rows [R, C]; slots int64 [R], -1
skipped. One program a row; G groups of N channels share a scale.
"""

import triton
import triton.language as tl


@triton.jit
def _exponent(top_G: tl.tensor, POWER: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """ceil(log2(top / limit)) of positive normal numbers, for the limit whose exponent is POWER and whose mantissa bits are MANTISSA."""
    bits_G = top_G.to(tl.int32, bitcast=True)
    return (bits_G >> 23) - 127 - POWER + ((bits_G & 0x7FFFFF) > MANTISSA).to(tl.int32)


@triton.jit
def _over(x_GN: tl.tensor, exponent_G: tl.tensor) -> tl.tensor:
    """x / 2^exponent."""
    return x_GN * ((127 - exponent_G) << 23).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def insert_fp8(
    cache_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    channels: tl.tensor,
    block_rows: tl.tensor,
    block_stride: tl.tensor,
    NOPE: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    INDEX: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """NOPE channels of a row as e4m3. INDEX: one group, its scale as fp32; else E8M0 bytes, 0 past the groups, and the other channels as bf16."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        group_G = tl.arange(0, GROUPS)
        channel_GN = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x_GN = tl.load(rows_ptr + row * channels + channel_GN, mask=channel_GN < NOPE, other=0.0).to(tl.float32)
        # 448 = 1.75 * 2^8
        exponent_G = _exponent(tl.maximum(tl.max(tl.abs(x_GN), axis=1), 1e-4), 8, 0x600000)
        code_GN = _over(x_GN, exponent_G).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        block = cache_ptr + slot // block_rows * block_stride
        place = slot % block_rows
        tl.store(block + place * VALUES + channel_GN, code_GN, mask=channel_GN < NOPE)
        scales = block + block_rows * VALUES + place * SCALES
        if INDEX:
            scale_G = ((exponent_G + 127) << 23).to(tl.float32, bitcast=True)
            tl.store(scales.to(tl.pointer_type(tl.float32)) + group_G, scale_G, mask=group_G < 1)
        else:
            byte_G = tl.where(group_G * GROUP < NOPE, exponent_G + 127, 0).to(tl.uint8)
            tl.store(scales + group_G, byte_G, mask=group_G < SCALES)
            pair_R = tl.arange(0, BLOCK_R)
            inside_R = pair_R < channels - NOPE
            rope_R = tl.load(rows_ptr + row * channels + NOPE + pair_R, mask=inside_R, other=0.0).to(tl.bfloat16)
            tl.store((block + place * VALUES + NOPE).to(tl.pointer_type(tl.bfloat16)) + pair_R, rope_R, mask=inside_R)


@triton.jit
def insert_fp4(
    cache_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    channels: tl.tensor,
    block_rows: tl.tensor,
    block_stride: tl.tensor,
    GROUPS: tl.constexpr,
) -> None:
    """A row as e2m1 codes, two a byte, with an E8M0 byte per 32 channels."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        group_G = tl.arange(0, GROUPS)
        channel_GN = group_G[:, None] * 32 + tl.arange(0, 32)[None, :]
        x_GN = tl.load(rows_ptr + row * channels + channel_GN, mask=channel_GN < channels, other=0.0).to(tl.float32)
        # 6 = 1.5 * 2^2; the floor is 6 * 2^-126
        exponent_G = _exponent(tl.maximum(tl.max(tl.abs(x_GN), axis=1), 7.052966104933725e-38), 2, 0x400000)
        y_GN = tl.abs(_over(x_GN, exponent_G))
        # halfway points; a tie goes to the even code
        code_GN = (y_GN > 0.25).to(tl.int32) + (y_GN >= 0.75).to(tl.int32) + (y_GN > 1.25).to(tl.int32) + (y_GN >= 1.75).to(tl.int32)
        code_GN += (y_GN > 2.5).to(tl.int32) + (y_GN >= 3.5).to(tl.int32) + (y_GN > 5.0).to(tl.int32)
        code_GN |= ((x_GN.to(tl.int32, bitcast=True) >> 31) & 1) << 3
        low_P, high_P = tl.split(tl.reshape(code_GN, (GROUPS * 16, 2)))
        block = cache_ptr + slot // block_rows * block_stride
        place = slot % block_rows
        pair_P = tl.arange(0, GROUPS * 16)
        tl.store(block + place * (channels // 2) + pair_P, (low_P | (high_P << 4)).to(tl.uint8), mask=pair_P < channels // 2)
        scales = block + block_rows * (channels // 2) + place * (channels // 32)
        tl.store(scales + group_G, (exponent_G + 127).to(tl.uint8), mask=group_G < channels // 32)
