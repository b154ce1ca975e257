"""Stored encodings of weights, FP8 with 128x128 scales and FP4 with one scale per 32, packed and unpacked in small blocks.

Bitwise equal to the contracts dequant_fp8_block and dequant_mxfp4 (ops/quant.py), which define them; this is the fast path of the
loader. N rows, K columns. Source: specification section 10.3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ops.quant import FP8_MAX, dequant_fp8_block, dequant_mxfp4, e8m0_bytes, e8m0_values, power_of_two_exponent
from ops.quant_fp4 import FP4_FLOOR, FP4_VALUES
from v4.errors import CheckpointError
from v4.tensors import BLOCK, GROUP

SCALE_LOW, SCALE_HIGH = -40, 40
"""Exponents of plausible weight scales; real ones lie near 2^-10."""
_FLOOR = 1e-4
_CHUNK = 1 << 17


def quantise_fp8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Float weight [N, K] -> float8_e4m3fn [N, K] and float8_e8m0fnu [ceil(N/128), ceil(K/128)].

    Per block s = 2^ceil(log2(max(amax, 1e-4)/448)), codes to nearest even.
    """
    n, k = w_NK.shape
    padded = torch.nn.functional.pad(w_NK.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    exponent = power_of_two_exponent(blocks.abs().amax((1, 3)).clamp(min=_FLOOR), FP8_MAX)
    factor = e8m0_values(e8m0_bytes(-exponent))
    codes = (blocks * factor[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).flatten(2).flatten(0, 1)[:n, :k]
    return codes.contiguous().to(torch.float8_e4m3fn), e8m0_bytes(exponent)


def quantise_fp4(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Float weight [N, K] -> packed uint8 [N, K/2], low nibble first, and float8_e8m0fnu [N, K/32]; equal to quant_mxfp4."""
    n, k = w_NK.shape
    packed, scale = torch.empty((n, k // 2), dtype=torch.uint8), torch.empty((n, k // GROUP), dtype=torch.uint8)
    rows = max(1, _CHUNK // k)
    for start in range(0, n, rows):
        groups = w_NK[start : start + rows].float().unflatten(1, (-1, GROUP))
        exponent = power_of_two_exponent(groups.abs().amax(-1).clamp(min=FP4_FLOOR), FP4_VALUES[-1])
        scaled = groups * e8m0_values(e8m0_bytes(-exponent))[..., None]
        y = scaled.abs()
        # codes step by 1/2 below 2, by 1 below 4 and by 2 above: each rounding is right in its range and too large outside
        code = torch.minimum(torch.minimum((2 * y).round(), y.round() + 2), (y / 2).round() + 4).to(torch.uint8)
        code |= scaled.signbit().to(torch.uint8) << 3
        pairs = code.view(-1, k // 2, 2)
        packed[start : start + rows] = pairs[..., 0] | (pairs[..., 1] << 4)
        scale[start : start + rows] = e8m0_bytes(exponent).view(torch.uint8)
    return packed, scale.view(torch.float8_e8m0fnu)


def quantise_int8(w_NK: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Float weight [N, K] -> int8 [N, K] and scales [N] in `scale_dtype`: amax / 127 of each row, rounded to that type before it divides.

    Codes to nearest even, at most +-127. A row of zeros has scale 0.
    """
    n, k = w_NK.shape
    codes, scale = torch.empty((n, k), dtype=torch.int8), torch.empty(n, dtype=scale_dtype)
    rows = max(1, _CHUNK // max(k, 1))
    for start in range(0, n, rows):
        part = w_NK[start : start + rows].float()
        scale[start : start + rows] = part.abs().amax(-1) / 127
        wide = scale[start : start + rows].float()
        safe = torch.where(wide > 0, wide, torch.ones_like(wide))
        codes[start : start + rows] = (part / safe[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scale


@functools.cache
def _fp8_table(dtype: torch.dtype) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    ones = torch.full((1, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return dequant_fp8_block.reference(codes, ones, dtype=dtype).flatten().to(dtype)


@functools.cache
def _fp4_table(dtype: torch.dtype) -> Tensor:
    # one entry per byte: both values side by side, looked up as a single integer of twice the width
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ones = torch.full((16, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    pairs = dequant_mxfp4.reference(codes, ones, dtype=dtype).to(dtype).contiguous().view(256, 2)
    return pairs.view(_pair(dtype)).flatten()


def _pair(dtype: torch.dtype) -> torch.dtype:
    return {4: torch.int64, 2: torch.int32}[dtype.itemsize]


def _work_type(dtype: torch.dtype) -> torch.dtype:
    # every product of a code and a plausible scale is exact in both; other types are rounded once at the end
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


def unpack_fp8(weight: Tensor, scale: Tensor, out_NK: Tensor) -> None:
    """float8_e4m3fn [N, K] and float8_e8m0fnu [ceil(N/128), ceil(K/128)] -> contiguous `out_NK` in its own float type."""
    n, k = weight.shape
    work = _work_type(out_NK.dtype)
    table, factors = _fp8_table(work), e8m0_values(scale).to(work)
    codes = weight.view(torch.uint8)
    rows = max(1, _CHUNK // k // BLOCK) * BLOCK
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        target = out_NK[start:stop] if work is out_NK.dtype else torch.empty((stop - start, k), dtype=work)
        torch.index_select(table, 0, codes[start:stop].flatten().int(), out=target.view(-1))
        row_factors = factors[start // BLOCK : -(-stop // BLOCK)]
        if (stop - start) % BLOCK == 0 and k % BLOCK == 0:
            target.view(-1, BLOCK, k // BLOCK, BLOCK).mul_(row_factors[:, None, :, None])
        else:
            target.mul_(row_factors.repeat_interleave(BLOCK, 0)[: stop - start].repeat_interleave(BLOCK, 1)[:, :k])
        if work is not out_NK.dtype:
            out_NK[start:stop].copy_(target)


def unpack_fp4(packed: Tensor, scale: Tensor, out_NK: Tensor) -> None:
    """Packed bytes [N, K/2] and float8_e8m0fnu [N, K/32] -> contiguous `out_NK` [N, K] in its own float type."""
    n, k = out_NK.shape
    work = _work_type(out_NK.dtype)
    table, factors, codes = _fp4_table(work), e8m0_values(scale).to(work), packed.view(torch.uint8)
    rows = max(1, _CHUNK // k)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        target = out_NK[start:stop] if work is out_NK.dtype else torch.empty((stop - start, k), dtype=work)
        torch.index_select(table, 0, codes[start:stop].flatten().int(), out=target.view(-1).view(_pair(work)))
        target.view(stop - start, k // GROUP, GROUP).mul_(factors[start:stop, :, None])
        if work is not out_NK.dtype:
            out_NK[start:stop].copy_(target)


def unpack_int8(codes: Tensor, scale: Tensor, out_NK: Tensor) -> None:
    """int8 [N, K] and scales [N] -> contiguous `out_NK` in its own float type, one rounding."""
    n, k = out_NK.shape
    rows = max(1, _CHUNK // max(k, 1))
    for start in range(0, n, rows):
        part = codes[start : start + rows].float().mul_(scale[start : start + rows].float()[:, None])
        out_NK[start : start + rows].copy_(part)


def channel_scale_problem(scale: Tensor, *, file: str, tensor: str) -> CheckpointError | None:
    """What is wrong with the scales [N] of an INT8 weight: a number that is not finite, or below 0."""
    wide = scale.float()
    wrong = ~torch.isfinite(wide) | (wide < 0)
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    found = f"{float(wide[first])} at [{first}], {int(wrong.sum())} such in all"
    hint = "The file is damaged: convert the checkpoint again"
    return CheckpointError("absurd scale", file=file, tensor=tensor, found=found, expected="finite numbers from 0", hint=hint)


def scale_problem(scale: Tensor, *, file: str, tensor: str) -> CheckpointError | None:
    """What is wrong with the E8M0 scales [R, C] of a weight: a NaN byte, or an exponent outside 2^-40 .. 2^40."""
    codes = scale.view(torch.uint8)
    if not codes.numel() or (int(codes.min()) >= 127 + SCALE_LOW and int(codes.max()) <= 127 + SCALE_HIGH):
        return None
    expected = f"powers of two from 2^{SCALE_LOW} to 2^{SCALE_HIGH}"
    hint = "The file is damaged or the scales were written by value instead of by exponent byte: download it again"
    if nan := (codes == 255).nonzero().tolist():
        return CheckpointError(
            "NaN scale",
            file=file,
            tensor=tensor,
            found=f"byte 255 (NaN) at {nan[0]}, {len(nan)} in all",
            expected=expected,
            hint=hint,
        )
    bad = ((codes < 127 + SCALE_LOW) | (codes > 127 + SCALE_HIGH)).nonzero().tolist()
    found = f"2^{int(codes[tuple(bad[0])]) - 127} at {bad[0]}, {len(bad)} such in all"
    return CheckpointError("absurd scale", file=file, tensor=tensor, found=found, expected=expected, hint=hint)
