"""Rotary tables: plain for window-only layers, YaRN with amplitude 1 for compressed layers.

Shapes: R2 rotary pairs, S rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4.cache import HOST
from v4.config import Config


def frequencies(config: Config, compressed: bool) -> Tensor:
    """Angular frequency of each rotary pair, fp32 [R2], radians per position.

    compressed False: theta = rope_theta without YaRN; True: compress_rope_theta with static YaRN interpolation, used by
    every tensor of CSA and HCA layers. Source: specification section 4.1.
    """
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    plain = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=HOST) / dim))
    scaling = config.rope_scaling
    if not compressed or scaling is None:
        return plain

    def correction(rotations: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=HOST) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def rows(frequency_R2: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, R2] fp32 of fp32(position) * fp32(frequency); amplitude 1 (no YaRN magnitude)."""
    angle = positions_S.to(torch.float32)[:, None] * frequency_R2
    return angle.cos(), angle.sin()
