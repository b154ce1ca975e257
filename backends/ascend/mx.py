"""Ascend 950: FP8 and MXFP4 weights as the hub stores them, multiplied without re-encoding.

The hub's scales are powers of two for blocks of 128 x 128 (FP8) or 32 (FP4), those of its activations for 128 channels. The chip's MX
products take one power of two per 32: repeating a scale is exact. With activations in MXFP8 nothing is repeated: npu_dynamic_mx_quant with
scale_alg 1 rounds the exponent up, gives a block of zeros the scale byte 0 and codes of 0, and treats subnormal scales as normal ones.
Shapes as in ops/linear.py, ops/linear_mx.py and ops/experts_quant.py. Source: Ascend operator notes, sections 3, 4 and 9; ops-nn,
aclnnDynamicMxQuantV3.md and dynamic_mx_quant_tail_axis_fp8.h (ComputeScaleCublas, ComputeData); cann-recipes-infer, npu_swiglu_group_quant.
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
from ops.linear_mx import linear_mx
from ops.quant import quant_fp8, quant_mxfp8

QUANT_MATMUL, MX_QUANT, SWIGLU_QUANT = "npu::npu_quant_matmul", "npu::npu_dynamic_mx_quant", "custom::npu_swiglu_group_quant"
E4M3, E8M0, FP4 = 292, 293, 296
"""ACL's numbers of the types."""

_BLOCK, _MX, _PAIR = 128, 32, 64
_MX_GROUPS = [1, 1, _MX]
_ROUND_UP = 1
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
    return mx_matmul(x, row_scales(x_scale, weight_NK.shape[1]), weight_NK, scale, torch.bfloat16)


def mx_matmul(x: Tensor, x_scale: Tensor, weight_NK: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """[T, N] of codes e4m3 [T, K] with scales uint8 [T, K/64, 2] and a weight e4m3 [N, K] with E8M0 scales of its 128 x 128 blocks."""
    n, k = weight_NK.shape
    scales = block_scales(scale, n, k)

    def part(rows: slice) -> Tensor:
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            x1=x,
            x2=weight_NK[rows].t(),
            scale=scales[:, rows],
            pertoken_scale=x_scale,
            output_dtype=out_dtype,
            scale_dtype=E8M0,
            pertoken_scale_dtype=E8M0,
            group_sizes=_MX_GROUPS,
        )
        return y

    return in_parts(part, n)


def mx_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [T, K] and scales uint8 [T, K/64, 2], one power of two per 32 channels, exponents rounded up."""
    codes, scale = torch.ops.npu.npu_dynamic_mx_quant(
        input=x, axis=-1, round_mode="rint", dst_type=E4M3, block_size=_MX, scale_alg=_ROUND_UP, dst_type_max=0.0, max_low_bound=0.0
    )
    return codes, scale


def flat_scales(scale_TP2: Tensor) -> Tensor:
    """Scales uint8 [T, K/64, 2] as E8M0 [T, K/32]."""
    return scale_TP2.flatten(1).view(torch.float8_e8m0fnu)


@quant_mxfp8.implement(
    "ascend",
    name="npu_dynamic_mx_quant",
    dtypes=(torch.bfloat16, torch.float16),
    soc=("950",),
    needs=(MX_QUANT,),
    when=lambda x_TK: x_TK.shape[0] > 0 and x_TK.shape[1] % _PAIR == 0 and x_TK.is_contiguous() and x_TK.element_size() == 2,
)
def _quant_mxfp8(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = mx_quantise(x_TK)
    return codes, flat_scales(scale)


def _linear_mx_when(x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype) -> bool:
    n, k = weight_NK.shape
    types = out_dtype in (torch.bfloat16, torch.float16, torch.float32)
    return types and x.shape[0] > 0 and n % _BLOCK == 0 and k % _BLOCK == 0 and k <= LARGEST and x.is_contiguous() and x_scale.is_contiguous()


@linear_mx.implement("ascend", name="npu_quant_matmul", soc=("950",), needs=(QUANT_MATMUL,), when=_linear_mx_when)
def _linear_mx(x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return mx_matmul(x, x_scale.view(torch.uint8).view(x.shape[0], -1, 2), weight_NK, scale, out_dtype)


def swiglu_quantise(gate_up_A2I: Tensor, limit: float, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Clamped SwiGLU in fp32, quantised: codes e4m3 [A, I] and scales uint8 [A, I/64, 2]; rows behind the counts are undefined."""
    codes, scale, _ = torch.ops.custom.npu_swiglu_group_quant(
        x=gate_up_A2I,
        weight=None,
        group_index=counts_E,
        dst_type=torch.float8_e4m3fn,
        quant_mode=1,
        block_size=0,
        round_scale=True,
        clamp_limit=limit,
        output_origin=False,
    )
    return codes, scale.view(torch.uint8)


def _experts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> bool:  # fmt: skip
    experts, width, half = w2.shape
    sizes = experts <= MOST_EXPERTS and width % _BLOCK == 0 and 2 * half % _BLOCK == 0 and max(width, 4 * half) < WIDEST
    rows = rows_AD.shape[0] > 0 and rows_AD.dtype == torch.bfloat16 and rows_AD.is_contiguous()
    return quantize and sizes and rows and representable(limit, rows_AD.dtype)


def fp4_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, counts_E: Tensor) -> Tensor:
    """bf16 [A, N] of codes e4m3 [A, K] with scales uint8 [A, K/64, 2], sorted by expert, and FP4 weights [E, N, K/2] with E8M0 [E, N, K/32]."""
    fixed: dict[str, Any] = {"weight_dtype": FP4, "per_token_scale_dtype": E8M0, "tuning_config": [0], "output_dtype": torch.bfloat16}
    scales = {"per_token_scale": [scale], "antiquant_scale": [weight_scale.unflatten(2, (-1, 2)).transpose(1, 2)]}
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

    def product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        codes, scale = round_rows(x)
        return fp4_product(codes, row_scales(scale, x.shape[1]), weight, weight_scale, counts_E)

    h_AI = clamped_halves(product(rows_AD, w13, s13), limit) * row_weight_A[:, None]
    return product(h_AI.to(rows_AD.dtype), w2, s2)
