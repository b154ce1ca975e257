"""W8A8: INT8 weights with a scale per output channel, INT8 activations with a scale per token.

Integer products are exact, so only the scales round: the contracts' own bounds hold. Shapes as in ops/linear.py and ops/experts_int8.py.
Source: Ascend operator notes, sections 3, 4 and 9; cann-recipes-infer, docs of npu_dequant_swiglu_clamp_quant and npu_rms_norm_dynamic_quant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from backends.ascend.moe import (
    CLIPPED,
    GROUPED,
    MOST_EXPERTS,
    OLDER,
    WIDEST,
    clamped_halves,
    clipped_swiglu,
    grouped_product,
    representable,
)
from ops.experts_int8 import grouped_experts_int8
from ops.linear import linear_int8
from ops.quant import quant_int8

DYNAMIC_QUANT, QUANT_MATMUL = "npu::npu_dynamic_quant", "npu::npu_quant_matmul"
CLAMP_QUANT = "custom::npu_dequant_swiglu_clamp_quant"
"""The wheel's npu_dequant_swiglu_quant is not offered: with its clamp, gate and up alternate (aclnnDequantSwigluQuantV2, swigluMode 1)."""

_HALVES = (torch.bfloat16, torch.float16)
LARGEST = 65535
"""Most channels on a side of a quantised product; Pro's queries have 65536 and are computed in two parts."""

_INNER, _INNER_STEP = 5120, 64
_wide = ByIdentity()
Activated = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(codes, scales, counts, w13, s13, limit) -> codes and scales of the activation."""



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


def quant_matmul(x: Tensor, x_scale: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """bf16 [T, N] of codes int8 [T, K] with fp32 [T] and a weight int8 [N, K] with [N]."""
    y: Tensor = torch.ops.npu.npu_quant_matmul(x1=x, x2=weight_NK.t(), scale=scale, pertoken_scale=x_scale, output_dtype=torch.bfloat16)
    return y


@linear_int8.implement("ascend", name="npu_quant_matmul", needs=(QUANT_MATMUL,), when=_linear_when)
def _linear_int8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    assert x_scale is not None
    row_scale = x_scale
    return in_parts(lambda rows: quant_matmul(x, row_scale, weight_NK[rows], scale[rows]), weight_NK.shape[0])


def in_parts(part: Callable[[slice], Tensor], outputs: int) -> Tensor:
    """part(rows of the weight) [T, n] for all `outputs` rows, in as few calls as the limit allows; parts start at multiples of 128."""
    step = outputs if outputs <= LARGEST else LARGEST // 128 * 128
    if step >= outputs:
        return part(slice(None))
    return torch.cat([part(slice(first, first + step)) for first in range(0, outputs, step)], dim=1)


def fused_activation(codes: Tensor, scale: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Clamped SwiGLU of the first product of rows [A, D] sorted by expert, quantised again: codes int8 [A, I] and scales fp32 [A].

    The clamp needs int32 sums and the counts: without them the op has taken a branch that ignores its mode.
    """
    fixed: dict[str, Any] = {
        "activate_left": True, "quant_mode": 1, "activate_dim": -1, "swiglu_mode": 1, "clamp_limit": limit, "glu_alpha": 1.0, "glu_bias": 0.0,
    }  # fmt: skip
    sums = grouped_product(codes, w13, counts_E, output_dtype=torch.int32)
    h, h_scale = torch.ops.custom.npu_dequant_swiglu_clamp_quant(
        x=sums, weight_scale=s13 if s13.dtype == torch.float32 else _wide(s13, (), s13.float), activation_scale=scale, group_index=counts_E, **fixed
    )
    return h, h_scale


def _activation_in_parts(activate: Callable[[Tensor, float], Tensor]) -> Activated:
    """The same by the wheel's ops: the sums dequantised to bf16, the activation, its quantisation."""

    def run(codes: Tensor, scale: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        wide = grouped_product(codes, w13, counts_E, scale=[s13.bfloat16()], per_token_scale=[scale], output_dtype=torch.bfloat16)
        return quantise(activate(wide, limit))

    return run


def experts_fit(rows_AD: Tensor, w2: Tensor, s2: Tensor) -> bool:
    """Whether rows and second weights [E, D, I] are within the limits of the grouped products and of the activation between them."""
    experts, width, inner = w2.shape
    sizes = experts <= MOST_EXPERTS and max(width, 2 * inner) < WIDEST and inner <= _INNER and inner % _INNER_STEP == 0
    # a bf16 scale gives bf16 results
    return rows_AD.shape[0] > 0 and rows_AD.is_contiguous() and sizes and rows_AD.dtype == s2.dtype == torch.bfloat16


def _experts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> bool:  # fmt: skip
    return quantize and experts_fit(rows_AD, w2, s2)


def _parts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
    quantize: bool = True,
) -> bool:  # fmt: skip
    # s13 goes in as bf16, which is exact for the scales of converted checkpoints in the type they are stored in
    exact = s13.dtype == torch.bfloat16 and representable(limit, rows_AD.dtype)
    return quantize and exact and experts_fit(rows_AD, w2, s2)


def second_product(h: Tensor, h_scale: Tensor, counts_E: Tensor, w2: Tensor, s2: Tensor) -> Tensor:
    """bf16 [A, D] of the activated codes of rows sorted by expert."""
    return grouped_product(h, w2, counts_E, scale=[s2], per_token_scale=[h_scale], output_dtype=torch.bfloat16)


def _experts_of(activated: Activated) -> Callable[..., Tensor]:
    def run(
        rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, *, limit: float,
        quantize: bool = True,
    ) -> Tensor:  # fmt: skip
        h, h_scale = activated(*quantise(rows_AD), counts_E, w13, s13, limit)
        # the codes of an activation do not depend on its row weight: the weight goes into the scale
        return second_product(h, h_scale * row_weight_A, counts_E, w2, s2)

    return run


grouped_experts_int8.implement(
    "ascend",
    name="npu_dynamic_quant, npu_grouped_matmul, npu_dequant_swiglu_clamp_quant",
    dtypes=(torch.bfloat16,),
    soc=OLDER,
    needs=(DYNAMIC_QUANT, GROUPED, CLAMP_QUANT),
    when=_experts_when,
)(_experts_of(lambda *call: fused_activation(*call)))  # looked up at the call, where tests replace it
grouped_experts_int8.implement(
    "ascend",
    name="npu_dynamic_quant, npu_grouped_matmul, npu_clipped_swiglu",
    dtypes=(torch.bfloat16,),
    soc=OLDER,
    needs=(DYNAMIC_QUANT, GROUPED, CLIPPED),
    when=_parts_when,
)(_experts_of(_activation_in_parts(clipped_swiglu)))
grouped_experts_int8.implement(
    "ascend",
    name="npu_dynamic_quant, npu_grouped_matmul, clamp, npu_swiglu",
    dtypes=(torch.bfloat16,),
    soc=("950",),
    needs=(DYNAMIC_QUANT, GROUPED, "npu::npu_swiglu"),
    when=_parts_when,
)(_experts_of(_activation_in_parts(lambda gate_up, limit: clamped_halves(gate_up, limit))))
