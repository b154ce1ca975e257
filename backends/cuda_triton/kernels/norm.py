"""RMS norms of rows and rotations of their last channels.

Shapes: R rows of a program, D row width (channels), T tokens, R2 rotary pairs.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y = x / rms(x), times a weight and with a residual added to x before, where asked for; the sum is stored too."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK)
    inside_RD = (row_R < rows)[:, None] & (column_D < width)[None, :]
    at_RD = row_R.to(tl.int64)[:, None] * width + column_D[None, :]
    x_RD = tl.load(x_ptr + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
    if RESIDUAL:
        x_RD += tl.load(residual_ptr + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
        tl.store(sum_ptr + at_RD, x_RD.to(sum_ptr.dtype.element_ty), mask=inside_RD)
    inverse_R = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / width + eps)
    y_RD = x_RD * inverse_R[:, None]
    if WEIGHT:
        weight_D = tl.load(weight_ptr + column_D, mask=column_D < width, other=0.0).to(tl.float32)
        y_RD = y_RD * weight_D[None, :]
    tl.store(y_ptr + at_RD, y_RD.to(y_ptr.dtype.element_ty), mask=inside_RD)


@triton.jit
def rope(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    pairs: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rotate interleaved pairs of the last 2*R2 channels of each row, after a weightless RMS norm where asked for.

    Rows are token-major with `heads` rows a token, of an even width, so that a pair lies in neighbouring registers.
    """
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK)
    at_RD = row_R.to(tl.int64)[:, None] * width + column_D[None, :]
    inside_RD = (row_R < rows)[:, None] & (column_D < width)[None, :]
    x_RD = tl.load(x_ptr + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
    if NORM:
        x_RD = x_RD * tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / width + eps)[:, None]
    a_RP, b_RP = tl.split(tl.reshape(x_RD, (ROWS, BLOCK // 2, 2)))
    pair_P = tl.arange(0, BLOCK // 2) - (width // 2 - pairs)
    turned_RP = (row_R < rows)[:, None] & ((pair_P >= 0) & (pair_P < pairs))[None, :]
    angle_RP = (row_R // heads).to(tl.int64)[:, None] * pairs + pair_P[None, :]
    cos_RP = tl.load(cos_ptr + angle_RP, mask=turned_RP, other=1.0)
    sin_RP = tl.load(sin_ptr + angle_RP, mask=turned_RP, other=0.0)
    if INVERSE:
        sin_RP = -sin_RP
    turned_a_RP = tl.where(turned_RP, a_RP * cos_RP - b_RP * sin_RP, a_RP)
    turned_b_RP = tl.where(turned_RP, a_RP * sin_RP + b_RP * cos_RP, b_RP)
    y_RD = tl.reshape(tl.join(turned_a_RP, turned_b_RP), (ROWS, BLOCK))
    tl.store(y_ptr + at_RD, y_RD.to(y_ptr.dtype.element_ty), mask=inside_RD)
