"""Quantisers on the CPU: scales and roundings by integer arithmetic on fp32 bit patterns, codes read back through tables.

Everything here is exact and bitwise that of the contracts, which use frexp and comparisons instead. Work goes in pieces of rows
that stay in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from backends.cpu.norm import PIECE, piece_rows
from ops import quant as contracts
from ops.quant import FP8_MAX, e8m0_values
from ops.quant_fp4 import FP4_FLOOR
from ops.quant_fp4 import fp4_values as fp4_table

_EXPONENT_BITS = 0x7F800000
_FP8_SMALLEST, _FP8_BITS = 2.0**-6, 3  # smallest normal number and stored mantissa bits of e4m3
_FP4_SMALLEST, _FP4_BITS = 1.0, 1


def _pieces(x: Tensor) -> Iterator[slice]:
    step = piece_rows(x) if x.numel() > PIECE else max(x.shape[0], 1)
    return (slice(i, i + step) for i in range(0, x.shape[0], step))


@functools.cache
def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32))


def _exponents(largest: Tensor, limit: float) -> Tensor:
    """ceil(log2(largest / limit)) of positive normal fp32 numbers: the difference of their bit patterns, rounded up."""
    return largest.view(torch.int32).add(0x7FFFFF - _bits(limit)).bitwise_right_shift_(23)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32 for exponents -126..127."""
    return exponent.add(127).bitwise_left_shift_(23).view(torch.float32)


def _scaled(g: Tensor, floor: float, limit: float) -> tuple[Tensor, Tensor]:
    """Groups [..., group] of fp32 divided by their power-of-two scale, newly allocated, and the scale's exponent [...]."""
    exponent = _exponents(g.abs().amax(-1).clamp_(min=floor), limit)
    return g * _power(exponent.neg())[..., None], exponent


def _steps(y: Tensor, smallest: float, bits: int) -> Tensor:
    """Distance of neighbouring codes around each element of y: its power of two, at least `smallest`, over 2^bits."""
    power = y.abs().clamp_(min=smallest).view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    return power.sub_(bits << 23).view(torch.float32)


def _round_(y: Tensor, smallest: float, bits: int) -> Tensor:
    """y, at most the largest code, rounded in place to the nearest code value, ties to even."""
    step = _steps(y, smallest, bits)
    return y.div_(step).round_().mul_(step)


@functools.lru_cache(maxsize=32)
def _table(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of all 256 bytes: E4M3 and E8M0 codes one by one, FP4 bytes as pairs packed into one wider element."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    if kind == "e4m3":
        return byte.view(torch.float8_e4m3fn).to(dtype)
    if kind == "e8m0":
        return e8m0_values(byte, dtype)
    pairs = torch.stack((fp4_table(byte & 15, dtype), fp4_table(byte >> 4, dtype)), dim=-1)
    return pairs.view(torch.float64 if dtype == torch.float32 else torch.float32).view(-1)


def _look_up(kind: str, code: Tensor, dtype: torch.dtype) -> Tensor:
    return _table(kind, dtype, code.device).index_select(0, code.view(torch.uint8).reshape(-1).int())


def fp8_values(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of e4m3 codes in fp32 or bf16, exact."""
    return _look_up("e4m3", q, dtype).view(q.shape)


def fp4_values(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., 2K] of packed e2m1 codes [..., K] in fp32 or bf16, exact."""
    return _look_up("fp4", packed, dtype).view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_groups_(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """values [..., K], multiplied in place by the E8M0 scale [..., ceil(K/group)] of their group."""
    factor = _look_up("e8m0", scale, values.dtype).view(*scale.shape, 1)
    if values.shape[-1] % group:
        return values.mul_(factor.expand(*scale.shape, group).flatten(-2)[..., : values.shape[-1]])
    values.unflatten(-1, (-1, group)).mul_(factor)
    return values


def scale_blocks_(values: Tensor, scale: Tensor) -> Tensor:
    """values [N, K], multiplied in place by the E8M0 scale [ceil(N/128), ceil(K/128)] of their block."""
    rows = scale.view(torch.uint8).repeat_interleave(128, 0)[: values.shape[0]]
    return scale_groups_(values, rows, 128)


def _quant_groups(x_TK: Tensor, group: int, floor: float) -> tuple[Tensor, Tensor]:
    tokens, width = x_TK.shape
    q = x_TK.new_empty(tokens, width, dtype=torch.float8_e4m3fn)
    scale = x_TK.new_empty(tokens, -(-width // group), dtype=torch.uint8)
    for rows in _pieces(x_TK):
        y, exponent = _scaled(contracts.grouped(x_TK[rows].float(), group), floor, FP8_MAX)
        q[rows] = y.flatten(-2)[:, :width].to(torch.float8_e4m3fn)
        scale[rows] = exponent.add_(127)
    return q, scale.view(torch.float8_e8m0fnu)


_NORMAL_FLOOR = FP8_MAX * 2.0**-126


@contracts.quant_fp8.implement("cpu")
def _quant_fp8(x_TK: Tensor, *, group: int = 128, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    if floor < _NORMAL_FLOOR:  # scales below the range of E8M0, which bit patterns of normal numbers do not reach
        return contracts.quant_fp8.reference(x_TK, group=group, floor=floor)
    return _quant_groups(x_TK, group, floor)


@contracts.quant_mxfp8.implement("cpu")
def _quant_mxfp8(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    return contracts.quant_mxfp8.reference(x_TK)


@contracts.quant_mxfp4.implement("cpu")
def _quant_mxfp4(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = x_TK.shape
    q = x_TK.new_empty(tokens, width // 2, dtype=torch.uint8)
    scale = x_TK.new_empty(tokens, width // 32, dtype=torch.uint8)
    for rows in _pieces(x_TK):
        y, exponent = _scaled(x_TK[rows].float().unflatten(-1, (-1, 32)), FP4_FLOOR, 6.0)
        sign, step = torch.signbit(y), _steps(y, _FP4_SMALLEST, _FP4_BITS)
        # two codes for every doubling of the step from 1/2 on, plus the multiple of the step
        code = y.abs_().div_(step).round_().to(torch.uint8)
        code += (step.view(torch.int32) >> 22).sub_(252).to(torch.uint8)
        code = code.bitwise_or_(sign.to(torch.uint8) << 3).flatten(-2)
        q[rows] = code[:, 0::2] | (code[:, 1::2] << 4)
        scale[rows] = exponent.add_(127)
    return q, scale.view(torch.float8_e8m0fnu)


@contracts.quant_int8.implement("cpu")
def _quant_int8(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = x_TK.new_empty(x_TK.shape, dtype=torch.int8), x_TK.new_empty(x_TK.shape[0], dtype=torch.float32)
    for rows in _pieces(x_TK):
        q[rows], scale[rows] = contracts.quant_int8.reference(x_TK[rows])
    return q, scale


@contracts.dequant_fp8.implement("cpu")
def _dequant_fp8(q: Tensor, scale: Tensor, *, group: int = 128, dtype: torch.dtype) -> Tensor:
    return scale_groups_(fp8_values(q, torch.float32), scale, group).to(dtype)


@contracts.dequant_fp8_block.implement("cpu")
def _dequant_fp8_block(w_NK: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return scale_blocks_(fp8_values(w_NK, torch.float32), scale).to(dtype)


@contracts.dequant_mxfp4.implement("cpu")
def _dequant_mxfp4(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return scale_groups_(fp4_values(q, torch.float32), scale, 32).to(dtype)


@contracts.dequant_int8.implement("cpu")
def _dequant_int8(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return q.float().mul_(scale[:, None]).to(dtype)


def _round_trip(y: Tensor, group: int, floor: float, limit: float, smallest: float, bits: int) -> Tensor:
    """fp32 rows [..., K], K a multiple of the group, quantised and dequantised into a new tensor."""
    scaled, exponent = _scaled(y.unflatten(-1, (-1, group)), floor, limit)
    return _round_(scaled, smallest, bits).mul_(_power(exponent)[..., None]).flatten(-2)


@contracts.roundtrip_fp8.implement("cpu")
def _roundtrip_fp8(x: Tensor, *, group: int = 64, channels: int) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    for rows in _pieces(y):
        head = y[rows][..., :channels]
        head.copy_(_round_trip(head.float(), group, 1e-4, FP8_MAX, _FP8_SMALLEST, _FP8_BITS))
    return y


@contracts.roundtrip_fp4.implement("cpu")
def _roundtrip_fp4(x: Tensor, *, group: int = 32) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _pieces(x):
        y[rows] = _round_trip(x[rows].float(), group, FP4_FLOOR, 6.0, _FP4_SMALLEST, _FP4_BITS)
    return y


@functools.lru_cache(maxsize=8)
def _matrix(n: int, device: torch.device) -> Tensor:
    return contracts.hadamard.reference(torch.eye(n, device=device), compute=torch.float32)


@contracts.hadamard.implement("cpu")
def _hadamard(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.numel() <= PIECE:
        return (rows.float() @ _matrix(x.shape[-1], x.device)).to(x.dtype).view(x.shape)
    y = torch.empty_like(rows)
    for piece in _pieces(rows):
        y[piece] = rows[piece].float() @ _matrix(x.shape[-1], x.device)
    return y.view(x.shape)
