"""Ascend 950: FP8 and MXFP4 weights as the hub stores them, multiplied without re-encoding.

The hub's scales are powers of two for blocks of 128 x 128 (FP8) or 32 (FP4), those of its activations for 128 channels. The chip's MX
products take one power of two per 32: repeating a scale is exact. Shapes as in ops/linear.py and ops/experts_quant.py.
Source: Ascend operator notes, sections 3, 4 and 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from backends.ascend.int8 import LARGEST, in_parts
from backends.ascend.moe import GROUPED, MOST_EXPERTS, WIDEST, clamped_halves, grouped_product, representable
from ops.experts_quant import grouped_experts_fp4
from ops.linear import linear_fp8
from ops.quant import quant_fp8

QUANT_MATMUL = "npu::npu_quant_matmul"
E8M0, FP4 = 293, 296
"""ACL's numbers of the types."""

_BLOCK, _MX, _PAIR = 128, 32, 64
_MX_GROUPS = [1, 1, _MX]
_scales = ByIdentity()


def row_scales(scale_TG: Tensor, inputs: int) -> Tensor:
    """E8M0 scales [T, K/128] of activations as uint8 [T, K/64, 2]: one per 32 channels, in pairs."""
    tokens, groups = scale_TG.shape
    wide = scale_TG.view(torch.uint8)[:, :, None].expand(tokens, groups, _BLOCK // _MX).reshape(tokens, inputs // _PAIR, 2)
    return wide.contiguous()  # with one group, reshape gives a view that repeats one byte, which the host code takes for a transposed one


def block_scales(scale_BG: Tensor, outputs: int, inputs: int) -> Tensor:
    """E8M0 scales [N/128, K/128] of a weight as uint8 [K/64, N, 2], made once per weight.

    A transposed view, because the weight goes in as one: the host code refuses a pair that differs in this.
    """

    def make() -> Tensor:
        wide = scale_BG.view(torch.uint8).repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK // _MX, 1)
        return wide.view(outputs, inputs // _PAIR, 2).transpose(0, 1)

    return _scales(scale_BG, (outputs, inputs), make)


def _linear_when(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> bool:  # fmt: skip
    n, k = weight_NK.shape
    given = x_scale is not None and out_dtype in (None, torch.bfloat16)
    return given and x.shape[0] > 0 and n % _BLOCK == 0 and k % _BLOCK == 0 and k <= LARGEST and x.is_contiguous()


@linear_fp8.implement("ascend", name="npu_quant_matmul", soc=("950",), needs=(QUANT_MATMUL,), when=_linear_when)
def _linear_fp8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    assert x_scale is not None
    n, k = weight_NK.shape
    scales, rows_scale = block_scales(scale, n, k), row_scales(x_scale, k)

    def part(rows: slice) -> Tensor:
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            x1=x,
            x2=weight_NK[rows].t(),
            scale=scales[:, rows],
            pertoken_scale=rows_scale,
            output_dtype=torch.bfloat16,
            scale_dtype=E8M0,
            pertoken_scale_dtype=E8M0,
            group_sizes=_MX_GROUPS,
        )
        return y

    return in_parts(part, n)


def _experts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> bool:  # fmt: skip
    experts, width, half = w2.shape
    sizes = experts <= MOST_EXPERTS and width % _BLOCK == 0 and 2 * half % _BLOCK == 0 and max(width, 4 * half) < WIDEST
    rows = rows_AD.shape[0] > 0 and rows_AD.dtype == torch.bfloat16 and rows_AD.is_contiguous()
    return quantize and sizes and rows and representable(limit, rows_AD.dtype)


def _fp4_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, counts_E: Tensor) -> Tensor:
    fixed: dict[str, Any] = {"weight_dtype": FP4, "per_token_scale_dtype": E8M0, "tuning_config": [0], "output_dtype": torch.bfloat16}
    scales = {"per_token_scale": [row_scales(scale, codes.shape[1])], "antiquant_scale": [weight_scale.unflatten(2, (-1, 2)).transpose(1, 2)]}
    return grouped_product(codes, weight, counts_E, **scales, **fixed)


@grouped_experts_fp4.implement(
    "ascend",
    name="npu_grouped_matmul (e4m3 x fp4), npu_swiglu",
    dtypes=(torch.bfloat16,),
    soc=("950",),
    needs=(GROUPED, "npu::npu_swiglu"),
    when=_experts_when,
    note="activations quantised by plain torch: power-of-two scales per 128",
)
def _grouped_experts_fp4(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> Tensor:  # fmt: skip
    round_rows = quant_fp8.impls["cpu"].fn
    codes, scale = round_rows(rows_AD)
    h_AI = clamped_halves(_fp4_product(codes, scale, w13, s13, counts_E), limit) * row_weight_A[:, None]
    codes, scale = round_rows(h_AI.to(rows_AD.dtype))
    return _fp4_product(codes, scale, w2, s2, counts_E)
