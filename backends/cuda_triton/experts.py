"""Grouped experts in two products; with FP4 weights a kernel before them lays the rows out in tiles.

Shapes as in ops/experts.py and ops/experts_quant.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backends.cuda_triton.launch import NEED, SOC, blocks, kernels, power
from ops.experts import grouped_experts
from ops.experts_quant import grouped_experts_fp4

BF16 = (torch.bfloat16,)
_GROUP = 128
"""Channels that share a scale of the FP8 rounding."""


def _plan(rows: int, experts: int) -> dict[str, int]:
    """Sizes of both products' launches by the rows that an expert gets on average; chosen by measurement on an H100."""
    if rows < 24 * experts:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _fp4_plan(rows: int, experts: int) -> dict[str, int]:
    """As _plan; a program has N columns of gate and of up, or 2 N of the way back. N = 128 are rounded where they are made."""
    if rows < experts // 4:
        # so few programs that each has a multiprocessor to itself: more warps, longer steps
        return {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3}
    if rows < 24 * experts:
        return {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def _tiles(rows: int, experts: int, block: int) -> int:
    # every expert with rows has at most one tile that is not full
    return rows // block + min(rows, experts)


def _rows_fit(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, limit: float) -> bool:
    if not (math.isfinite(limit) and limit > 0):
        return False
    if rows_AD.dtype != torch.bfloat16 or rows_AD.dim() != 2 or not rows_AD.numel() or w13.dim() != 3 or w2.dim() != 3:
        return False
    lists = row_weight_A.shape == rows_AD.shape[:1] and row_weight_A.dtype == torch.float32 and counts_E.dtype == torch.int64
    experts = counts_E.shape == w13.shape[:1] and w13.shape[0] == w2.shape[0] and w13.shape[1] > 0 and w13.shape[1] % 2 == 0
    return lists and experts and all(t.is_contiguous() for t in (rows_AD, row_weight_A, counts_E, w13, w2))


def weights_fit(width: int, w13: Tensor, w2: Tensor, limit: float) -> bool:
    """Whether the kernels of dense weights take these weights for rows of `width` channels."""
    if not w13.dtype == w2.dtype == torch.bfloat16 or w13.dim() != 3 or w2.dim() != 3 or not (math.isfinite(limit) and limit > 0):
        return False
    experts, twice, channels = w13.shape
    shapes = channels == width and twice > 0 and twice % 2 == 0 and w2.shape == (experts, width, twice // 2)
    return shapes and w13.is_contiguous() and w2.is_contiguous()


def dense_fits(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    """Whether the kernels of dense weights take the call."""
    return _rows_fit(rows_AD, row_weight_A, counts_E, w13, w2, limit) and weights_fit(rows_AD.shape[1], w13, w2, limit)


@grouped_experts.implement("cuda_triton", dtypes=BF16, soc=SOC, needs=[NEED], when=dense_fits, note="bf16 rows and weights")
def dense(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    """As the contract says."""
    (rows, width), experts, inner = rows_AD.shape, w13.shape[0], w13.shape[1] // 2
    module, sizes, padded = kernels("experts"), _plan(rows, experts), power(experts)
    tiles = _tiles(rows, experts, sizes["BLOCK_M"])
    h, y = rows_AD.new_empty(rows, inner), torch.empty_like(rows_AD)
    module.gate_up[(tiles, blocks(inner, sizes["BLOCK_N"]))](
        rows_AD, row_weight_A, counts_E, w13, h, experts, width, inner, limit, EXPERTS=padded, **sizes
    )
    module.down[(tiles, blocks(width, sizes["BLOCK_N"]))](h, counts_E, w2, y, experts, width, inner, EXPERTS=padded, **sizes)
    return y


def _fp4_fits(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> bool:
    if not _rows_fit(rows_AD, row_weight_A, counts_E, w13, w2, limit) or not w13.dtype == w2.dtype == torch.uint8:
        return False
    (experts, twice, packed), width = w13.shape, rows_AD.shape[1]
    inner = twice // 2
    shapes = width % 32 == inner % 32 == 0 and packed == width // 2 and w2.shape[1:] == (width, inner // 2)
    scales = s13.shape == (experts, twice, width // 32) and s2.shape == (experts, width, inner // 32)
    return shapes and scales and s13.dtype == s2.dtype == torch.float8_e8m0fnu and s13.is_contiguous() and s2.is_contiguous()


@grouped_experts_fp4.implement("cuda_triton", dtypes=BF16, soc=SOC, needs=[NEED], when=_fp4_fits, note="bf16 rows")
def _grouped_experts_fp4(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    (rows, width), experts, inner = rows_AD.shape, w13.shape[0], w13.shape[1] // 2
    module, sizes, padded = kernels("experts_fp4"), dict(_fp4_plan(rows, experts)), power(experts)
    tiles = _tiles(rows, experts, sizes["BLOCK_M"])
    height = sizes["BLOCK_M"]
    x, h = rows_AD.new_empty(tiles, width, height), rows_AD.new_empty(tiles, inner, height)
    y = torch.empty_like(rows_AD)
    block = min(power(width, _GROUP), max(8192 // height, _GROUP))
    module.prepare[(blocks(width, block), tiles)](
        rows_AD, counts_E, x, experts, width, QUANTIZE=quantize, EXPERTS=padded, BLOCK_M=height, BLOCK=block, num_warps=4
    )
    # columns first: programs that run together read the same rows
    columns = sizes.pop("BLOCK_N")
    fused = quantize and columns == _GROUP
    module.gate_up[(blocks(inner, columns), tiles)](
        x, row_weight_A, counts_E, w13, s13.view(torch.uint8), h, experts, inner, limit, DEPTH=width, QUANTIZE=fused, EXPERTS=padded,
        BLOCK_N=columns, **sizes,
    )  # fmt: skip
    if quantize and not fused:
        module.round_tiles[(blocks(inner, _GROUP), tiles)](h, counts_E, experts, inner, EXPERTS=padded, BLOCK_M=height, num_warps=4)
    module.down[(blocks(width, 2 * columns), tiles)](
        h, counts_E, w2, s2.view(torch.uint8), y, experts, width, DEPTH=inner, EXPERTS=padded, BLOCK_N=2 * columns, **sizes
    )
    return y
