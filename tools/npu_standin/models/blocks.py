"""Block formats of 950: fp8 and fp4 values with power-of-two scales per 32 (MX), and their transport as bytes.

A scale tensor of MX keeps blocks in pairs, [..., ceil(K/64), 2]; a block that does not exist has an undefined scale.
fp4 travels as uint8, two values per byte, the even one in the low half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import require, undefined
from tools.npu_standin.models.codes import FP4_E2M1

MX_BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SIGNED = torch.cat((E2M1, -E2M1))
_POWERS = torch.tensor([*(2.0 ** (b - 127) for b in range(255)), float("nan")])
_LARGEST_EXPONENT: dict[torch.dtype | str, int] = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15, FP4_E2M1: 2}
LARGEST: dict[torch.dtype | str, float] = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, FP4_E2M1: 6.0}


def to_e2m1(values: Tensor) -> Tensor:
    """4-bit codes of fp32 values, uint8 of the same shape: to nearest, ties to the even code, saturating at 6."""
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for lower in range(7):
        middle = float(E2M1[lower] + E2M1[lower + 1]) / 2
        code += ((size >= middle) if lower % 2 else (size > middle)).to(torch.uint8)
    return code | (values.signbit().to(torch.uint8) << 3)


def from_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of 4-bit codes."""
    return _SIGNED[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte along the last dimension."""
    require(codes.shape[-1] % 2 == 0, "fp4", f"{codes.shape[-1]} values in a row", "an even number")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The 4-bit codes of bytes, last dimension doubled."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def powers(bytes_: Tensor) -> Tensor:
    """fp32 2^(byte - 127) of e8m0 bytes, in whichever type they travel; 255 is NaN."""
    return _POWERS[bytes_.contiguous().view(torch.uint8).long()]


def cast(values: Tensor, kind: torch.dtype | str) -> Tensor:
    """fp32 to codes of `kind` (fp4: unpacked), saturating, ties to even."""
    if isinstance(kind, str):
        require(kind == FP4_E2M1, "cast", kind, "fp4 or fp8")
        return to_e2m1(values)
    return values.clamp(-LARGEST[kind], LARGEST[kind]).to(kind)


def scale_exponents(amax: Tensor, kind: torch.dtype | str, *, round_up: bool) -> Tensor:
    """Exponents of block scales: floor(log2 amax) - emax (OCP), or the least that keeps amax inside the type (round_up)."""
    if round_up:
        mantissa, exponent = torch.frexp(amax.double() / LARGEST[kind])
        found = torch.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        found = torch.frexp(amax.double())[1] - 1 - _LARGEST_EXPONENT[kind]
    return torch.where(amax > 0, found, torch.full_like(found, -127)).clamp(-127, 127)


def mx_quantised(x: Tensor, kind: torch.dtype | str, *, round_up: bool) -> tuple[Tensor, Tensor]:
    """Codes [..., K] (fp4: uint8 [..., K/2]) and scales float8_e8m0fnu [..., ceil(K/64), 2] of rows, blocks of 32."""
    width = x.shape[-1]
    blocks, pairs = -(-width // MX_BLOCK), -(-width // (2 * MX_BLOCK))
    wide = torch.nn.functional.pad(x.float(), (0, blocks * MX_BLOCK - width)).unflatten(-1, (blocks, MX_BLOCK))
    exponent = scale_exponents(wide.abs().amax(-1), kind, round_up=round_up)
    values = (wide.double() * torch.exp2(-exponent.double())[..., None]).float().flatten(-2)[..., :width]
    scales = undefined((*x.shape[:-1], pairs * 2), torch.uint8)
    scales[..., :blocks] = (exponent + 127).to(torch.uint8)
    codes = cast(values, kind)
    packed = pack(codes) if kind == FP4_E2M1 else codes
    return packed, scales.unflatten(-1, (pairs, 2)).view(torch.float8_e8m0fnu)


def mx_values(codes: Tensor, scales: Tensor, kind: torch.dtype | str) -> Tensor:
    """fp32 values of MX codes [..., K] (fp4: packed) with scales [..., ceil(K/64), 2]."""
    wide = from_e2m1(unpack(codes)) if kind == FP4_E2M1 else codes.float()
    width = wide.shape[-1]
    pairs = -(-width // (2 * MX_BLOCK))
    documented = (*wide.shape[:-1], pairs, 2)
    require(
        tuple(scales.shape) == documented, "MX scales", list(scales.shape), f"{list(documented)} for values {list(wide.shape)}"
    )
    per_block = powers(scales).flatten(-2)
    if width % MX_BLOCK == 0:
        return (wide.unflatten(-1, (-1, MX_BLOCK)) * per_block[..., : width // MX_BLOCK, None]).flatten(-2)
    return wide * per_block.repeat_interleave(MX_BLOCK, -1)[..., :width]
