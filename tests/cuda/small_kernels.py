"""Kernels of one operation each, for testing the interpreter."""

import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


@triton.jit
def through_fp8(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.float8e4nv).to(tl.float32))


@triton.jit
def product(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def scaled_product(code_ptr, scale_ptr, b_ptr, y_ptr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, channel, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    code = tl.load(code_ptr + row[:, None] * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :])
    scale = tl.load(scale_ptr + row[:, None] * (DEPTH // 32) + tl.arange(0, DEPTH // 32)[None, :])
    b = tl.load(b_ptr + channel[:, None] * COLUMNS + column[None, :])
    tl.store(y_ptr + row[:, None] * COLUMNS + column[None, :], tl.dot_scaled(code, scale, "e2m1", b, None, "bf16"))
