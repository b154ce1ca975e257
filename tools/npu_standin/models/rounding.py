"""How numbers are rounded where a document names the rounding: int8 per row, HF32, and row-wise dynamic scales."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_per_row(wide: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., D] and scale fp32 [...] = max|row| / 127; to nearest, ties to even. A row of zeros has scale 0 and codes 0."""
    wide = wide.float()
    scale = wide.abs().amax(-1) / 127 if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    codes = torch.where(scale[..., None] > 0, wide / scale[..., None], torch.zeros_like(wide))
    return codes.round().clamp(-128, 127).to(torch.int8), scale


def hf32(wide: Tensor) -> Tensor:
    """fp32 with the mantissa cut to 10 bits, towards zero."""
    return (wide.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
