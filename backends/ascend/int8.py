"""W8A8: INT8 weights with a scale per output channel, INT8 activations with a scale per token.

Integer products are exact, so only the scales round: the contracts' own bounds hold. Shapes as in ops/linear.py and ops/experts_int8.py.
Source: Ascend operator notes, sections 3, 4 and 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.ascend.moe import GROUPED, MOST_EXPERTS, WIDEST, grouped_product
from ops.experts_int8 import grouped_experts_int8
from ops.linear import linear_int8
from ops.quant import quant_int8

DYNAMIC_QUANT, QUANT_MATMUL, DEQUANT_SWIGLU = "npu::npu_dynamic_quant", "npu::npu_quant_matmul", "npu::npu_dequant_swiglu_quant"
_HALVES = (torch.bfloat16, torch.float16)
LARGEST = 65535
"""Most channels on a side of a quantised product; Pro's queries have 65536 and are computed in two parts."""

_INNER, _INNER_STEP = 5120, 64


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [T, K] and scales fp32 [T] = max / 127."""
    codes, scale = torch.ops.npu.npu_dynamic_quant(input=x, dst_type=torch.int8, quant_mode="pertoken")
    return codes, scale


@quant_int8.implement(
    "ascend",
    name="npu_dynamic_quant",
    dtypes=_HALVES,
    needs=(DYNAMIC_QUANT,),
    when=lambda x_TK: x_TK.dtype in _HALVES and x_TK.numel() > 0 and x_TK.is_contiguous(),
    note="its rounding is not documented; the contract's is half to even",
)
def _quant_int8(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(x_TK)


def _linear_when(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> bool:  # fmt: skip
    # without out_dtype codes give bf16; fp16 results would need scales packed by another op
    given = x_scale is not None and out_dtype in (None, torch.bfloat16)
    return given and x.shape[0] > 0 and weight_NK.shape[1] <= LARGEST and x.is_contiguous() and weight_NK.is_contiguous()


@linear_int8.implement("ascend", name="npu_quant_matmul", needs=(QUANT_MATMUL,), when=_linear_when)
def _linear_int8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    def part(rows: slice) -> Tensor:
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            x1=x, x2=weight_NK[rows].t(), scale=scale[rows], pertoken_scale=x_scale, output_dtype=torch.bfloat16
        )  # fmt: skip
        return y

    return in_parts(part, weight_NK.shape[0])


def in_parts(part: Callable[[slice], Tensor], outputs: int) -> Tensor:
    """part(rows of the weight) [T, n] for all `outputs` rows, in as few calls as the limit allows; parts start at multiples of 128."""
    step = outputs if outputs <= LARGEST else LARGEST // 128 * 128
    if step >= outputs:
        return part(slice(None))
    return torch.cat([part(slice(first, first + step)) for first in range(0, outputs, step)], dim=1)


def _experts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> bool:  # fmt: skip
    experts, width, inner = w2.shape
    sizes = experts <= MOST_EXPERTS and max(width, 2 * inner) < WIDEST and inner <= _INNER and inner % _INNER_STEP == 0
    # a bf16 scale gives bf16 results
    types = rows_AD.dtype == torch.bfloat16 and s2.dtype == torch.bfloat16
    return quantize and rows_AD.shape[0] > 0 and rows_AD.is_contiguous() and sizes and types


@grouped_experts_int8.implement(
    "ascend",
    name="npu_dynamic_quant, npu_grouped_matmul, npu_dequant_swiglu_quant",
    dtypes=(torch.bfloat16,),
    needs=(DYNAMIC_QUANT, GROUPED, DEQUANT_SWIGLU),
    when=_experts_when,
)
def _grouped_experts_int8(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> Tensor:  # fmt: skip
    codes, scale = quantise(rows_AD)
    sums = grouped_product(codes, w13, counts_E, output_dtype=torch.int32)
    h, h_scale = dequant_swiglu_quant(sums, s13.float(), scale, counts_E, limit)
    # the codes of an activation do not depend on its row weight: the weight goes into the scale
    return grouped_product(h, w2, counts_E, scale=[s2], per_token_scale=[h_scale * row_weight_A], output_dtype=torch.bfloat16)


def dequant_swiglu_quant(sums: Tensor, weight_scale: Tensor, row_scale: Tensor, counts_E: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Clamped SwiGLU of int32 sums [A, 2I], quantised again: codes int8 [A, I] and scales fp32 [A].

    activate_dim is always passed: without it the host code of 950 calls an older kernel, which loses mode and clamp.
    """
    fixed: dict[str, Any] = {
        "activate_left": True, "quant_mode": 1, "activate_dim": -1, "swiglu_mode": 1, "clamp_limit": limit, "glu_alpha": 1.0, "glu_bias": 0.0,
    }  # fmt: skip
    codes, scale = torch.ops.npu.npu_dequant_swiglu_quant(
        x=sums, weight_scale=weight_scale, activation_scale=row_scale, group_index=counts_E, **fixed
    )
    return codes, scale
