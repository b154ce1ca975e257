"""RMS norms and rotations in one pass over the rows. Shapes as in ops/norm.py and ops/rope.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC, blocks, kernels, power, warps
from ops.norm import add_rms_norm, rms_norm, unit_rms_norm
from ops.rope import q_norm_rope, rope

WIDEST = 16384
"""Channels of a row up to which one program holds it in registers."""

NOTE = f"contiguous rows of up to {WIDEST} channels"


def _rows_fit(x: Tensor) -> bool:
    return x.dtype in FLOATS and x.dim() >= 2 and x.is_contiguous() and x.numel() > 0 and x.shape[-1] <= WIDEST


def _tile(rows: int, width: int) -> dict[str, int]:
    # narrow rows share a program once there are enough of them to fill the chip
    block = power(width, 16)
    together = min(max(2048 // block, 1), 8) if rows >= 2048 else 1
    return {"ROWS": together, "BLOCK": block, "num_warps": warps(together * block)}


def _norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    total = y if residual is None else torch.empty_like(x)
    tile = _tile(rows, width)
    kernels("norm").rms_norm[(blocks(rows, tile["ROWS"]),)](
        x, x if weight is None else weight, x if residual is None else residual, y, total, rows, width, eps,
        WEIGHT=weight is not None, RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return y, total


def _weight_fits(x: Tensor, weight: Tensor) -> bool:
    return _rows_fit(x) and weight.dtype in FLOATS and weight.shape == x.shape[-1:] and weight.is_contiguous()


def _rms_fits(x: Tensor, weight: Tensor, *, eps: float) -> bool:
    return _weight_fits(x, weight)


@rms_norm.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_rms_fits, note=NOTE)
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return _norm(x, weight, None, eps)[0]


def _unit_fits(x: Tensor, *, eps: float) -> bool:
    return _rows_fit(x)


@unit_rms_norm.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_unit_fits, note=NOTE)
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    return _norm(x, None, None, eps)[0]


def _add_fits(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> bool:
    return _weight_fits(x, weight) and residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous()


@add_rms_norm.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_add_fits, note=NOTE)
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x, weight, residual, eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, eps: float | None, inverse: bool) -> Tensor:
    width, pairs = x.shape[-1], cos.shape[1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    tile = _tile(rows, width)
    kernels("norm").rope[(blocks(rows, tile["ROWS"]),)](
        x, cos, sin, y, rows, rows // x.shape[0], width, pairs, eps or 0.0, NORM=eps is not None, INVERSE=inverse, **tile
    )
    return y


def _turn_fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    tables = cos.dim() == 2 and cos.shape == sin.shape and cos.shape[0] == x.shape[0] and 2 * cos.shape[1] <= x.shape[-1]
    fp32 = cos.dtype == sin.dtype == torch.float32
    return _rows_fit(x) and x.shape[-1] % 2 == 0 and x.dim() in (2, 3) and tables and fp32 and cos.is_contiguous() and sin.is_contiguous()


def _rope_fits(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> bool:
    return _turn_fits(x, cos_TR2, sin_TR2)


@rope.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_rope_fits, note=NOTE)
def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    return _turn(x, cos_TR2, sin_TR2, None, inverse)


def _q_fits(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> bool:
    return q_THC.dim() == 3 and _turn_fits(q_THC, cos_TR2, sin_TR2)


@q_norm_rope.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_q_fits, note=NOTE)
def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    return _turn(q_THC, cos_TR2, sin_TR2, eps, False)
