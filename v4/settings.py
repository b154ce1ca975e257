"""How a model is built: op functions, activation type, and whether quantisation is carried out or left away."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from v4.cache import Format
from v4.config import Config


@dataclass(frozen=True)
class Settings:
    """What every module of the graph receives.

    packed: FP8/FP4 weights stay packed and activations are quantised before each such product.
    simulate: cache rows and index keys take the official FP8/FP4 round trips.
    """

    config: Config
    ops: SimpleNamespace
    dtype: torch.dtype
    packed: bool = False
    simulate: bool = False
    experts: str = "dense"
    format: Format = Format()

    def __post_init__(self) -> None:
        if self.experts not in ("dense", "fp4", "fp8"):
            raise ValueError(f"experts={self.experts!r}: expected 'dense', 'fp4' or 'fp8'")
