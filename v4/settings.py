"""How a model is built: op functions, activation type, and whether quantisation is carried out or left away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from v4.cache import Format
from v4.config import Config

Scope = Callable[[str, SimpleNamespace], SimpleNamespace]


@dataclass(frozen=True)
class Settings:
    """What every module of the graph receives.

    linears, experts: how weights are kept: "dense", "fp8" (128 x 128 blocks), "fp4" (experts only), "int8" (per channel) or "mx" (as "fp8", experts as
    "fp4", both with MXFP8 activations); activations are quantised to match before each such product.
    simulate: cache rows and index keys take the official FP8/FP4 round trips.
    scope: (place, ops) -> ops used there; how a recorder or a planted fault sees the calls of one layer only. None: ops everywhere.
    """

    config: Config
    ops: SimpleNamespace
    dtype: torch.dtype
    linears: str = "dense"
    simulate: bool = False
    experts: str = "dense"
    format: Format = Format()
    scope: Scope | None = None

    def at(self, place: str) -> Settings:
        """Settings of one part of the model ("layers.3", "mtp.0", "head"): with the ops that `scope` gives for it, if there is one."""
        return self if self.scope is None else replace(self, ops=self.scope(place, self.ops))

    def __post_init__(self) -> None:
        if self.experts not in ("dense", "fp4", "fp8", "int8", "mx"):
            raise ValueError(f"experts={self.experts!r}: expected 'dense', 'fp4', 'fp8', 'int8' or 'mx'")
        if self.linears not in ("dense", "fp8", "int8", "mx"):
            raise ValueError(f"linears={self.linears!r}: expected 'dense', 'fp8', 'int8' or 'mx'")
        if self.experts == "mx" and self.linears != "mx":
            raise ValueError(f"experts='mx' with linears={self.linears!r}: the routed and the shared experts of this form share one op")
