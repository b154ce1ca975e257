"""All experts of a layer over stored weights: activations quantised once, sorted as codes, and summed with the shared expert in one op.

npu_moe_finalize_routing adds in fp32, with fp32 weights beside bf16 rows, and rounds once. The first product of an INT8 shared expert goes with
those of the routed ones where weight preparation has laid it behind them. Shapes as in ops/moe_layer.py.
Source: Ascend operator notes, section 9; ops-transformer, docs of aclnnMoeInitRoutingV3 and aclnnMoeFinalizeRoutingV2 and the kernels
moe_finalize_routing_v2_bf16.h and arch35/moe_finalize_routing_v2_base.h.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from backends.ascend.int8 import (
    CLAMP_QUANT,
    DYNAMIC_QUANT,
    LARGEST,
    QUANT_MATMUL,
    experts_fit,
    fused_activation,
    quant_matmul,
    quantise,
    second_product,
)
from backends.ascend.moe import GROUPED, MOST_EXPERTS, OLDER, ROUTING
from backends.ascend.mx import MX_QUANT, SWIGLU_QUANT, fp4_product, mx_matmul, mx_quantise, swiglu_quantise
from ops.moe_layer import moe_int8, moe_mx

FINALIZE = "npu::npu_moe_finalize_routing"
_GATHER, _COUNTS, _BY_TOKEN = 0, 1, 2
_joined = ByIdentity()


def _sorted(codes: Tensor, scale: Tensor, ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of one row per token and choice, sorted by expert, the row of each t*K + k, and rows per expert."""
    rows, row_of, counts, row_scale = torch.ops.npu.npu_moe_init_routing_v2(
        x=codes,
        expert_idx=ids_TK,
        scale=scale,
        active_num=ids_TK.numel(),
        expert_capacity=-1,
        expert_num=experts,
        drop_pad_mode=0,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=_GATHER,
    )
    return rows, row_of, counts, row_scale


def _summed(y_AD: Tensor, row_of: Tensor, weights_TK: Tensor, shared_TD: Tensor) -> Tensor:
    """shared + sum over k of weight * row, in fp32, rounded once to bf16."""
    y: Tensor = torch.ops.npu.npu_moe_finalize_routing(
        expanded_permuted_rows=y_AD,
        skip1=shared_TD,
        skip2=None,
        bias=None,
        scales=weights_TK,
        expanded_src_to_dst_row=row_of,
        export_for_source_row=None,
        drop_pad_mode=_BY_TOKEN,
        k=weights_TK.shape[1],
    )
    return y


# ---- INT8 -----------------------------------------------------------------------------------------------------------


def behind(weight_E: Tensor, last: Tensor) -> Tensor | None:
    """weight [E, ...] with `last` [...] as its entry E, where that lies behind it in memory; else None."""
    alike = last.dtype == weight_E.dtype and last.shape == weight_E.shape[1:] and last.is_contiguous() and weight_E.is_contiguous()
    if not alike or last.untyped_storage().data_ptr() != weight_E.untyped_storage().data_ptr():
        return None
    if last.data_ptr() != weight_E.data_ptr() + weight_E.numel() * weight_E.element_size():
        return None
    return weight_E.as_strided((weight_E.shape[0] + 1, *weight_E.shape[1:]), weight_E.stride())


@functools.lru_cache(maxsize=64)
def _column(tokens: int, value: int, device: torch.device) -> Tensor:
    return torch.full((tokens, 1), value, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _count(tokens: int, device: torch.device) -> Tensor:
    return torch.full((1,), tokens, dtype=torch.int64, device=device)


def _int8_when(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> bool:  # fmt: skip
    shared = shared_w2.shape[1] <= LARGEST and max(shared_w13.shape) <= LARGEST and shared_w2.is_contiguous()
    inner = shared_w2.shape[1]
    return ids_TK.numel() > 0 and experts_fit(x_TD, w2, s2) and w2.shape[0] < MOST_EXPERTS and shared and inner <= 5120 and inner % 64 == 0


def _stacked_when(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> bool:  # fmt: skip
    weights = (w13, s13, w2, s2, shared_w13, shared_s13, shared_w2, shared_s2)
    return behind(w13, shared_w13) is not None and _int8_when(x_TD, ids_TK, weights_TK, *weights, limit=limit)


_NEEDS = (DYNAMIC_QUANT, ROUTING, GROUPED, CLAMP_QUANT, QUANT_MATMUL, FINALIZE)


@moe_int8.implement(
    "ascend",
    name="npu_moe_init_routing_v2, npu_grouped_matmul with the shared expert, npu_dequant_swiglu_clamp_quant, npu_moe_finalize_routing",
    dtypes=(torch.bfloat16,),
    soc=OLDER,
    needs=_NEEDS,
    when=_stacked_when,
)
def _moe_int8_stacked(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    (tokens, k), experts = ids_TK.shape, w13.shape[0]
    w13_all = behind(w13, shared_w13)
    assert w13_all is not None
    s13_all = _joined(s13, (), lambda: torch.cat((s13.float(), shared_s13[None])))
    ids = torch.cat((ids_TK, _column(tokens, experts, ids_TK.device)), 1)
    rows, row_of, counts, row_scale = _sorted(*quantise(x_TD), ids, experts + 1)
    h, h_scale = fused_activation(rows, row_scale, counts, w13_all, s13_all, limit)
    # rows of the last expert come last: those of the shared one, token by token
    routed = tokens * k
    shared_TD = quant_matmul(h[routed:], h_scale[routed:], shared_w2, shared_s2)
    y_AD = second_product(h[:routed], h_scale[:routed], counts[:experts], w2, s2)
    return _summed(y_AD, row_of.view(tokens, k + 1)[:, :k].reshape(-1), weights_TK, shared_TD)


@moe_int8.implement(
    "ascend",
    name="npu_moe_init_routing_v2, npu_grouped_matmul, npu_dequant_swiglu_clamp_quant, npu_moe_finalize_routing",
    dtypes=(torch.bfloat16,),
    soc=OLDER,
    needs=_NEEDS,
    when=_int8_when,
)
def _moe_int8(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    codes, scale = quantise(x_TD)
    count = _count(x_TD.shape[0], x_TD.device)
    shared_TD = quant_matmul(*fused_activation(codes, scale, count, shared_w13[None], shared_s13[None], limit), shared_w2, shared_s2)
    rows, row_of, counts, row_scale = _sorted(codes, scale, ids_TK, w13.shape[0])
    y_AD = second_product(*fused_activation(rows, row_scale, counts, w13, s13, limit), counts, w2, s2)
    return _summed(y_AD, row_of, weights_TK, shared_TD)


# ---- FP8 and MXFP4 --------------------------------------------------------------------------------------------------


def _mx_when(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> bool:  # fmt: skip
    width, inner, shared = x_TD.shape[1], w13.shape[1] // 2, shared_w2.shape[1]
    sizes = w13.shape[0] <= MOST_EXPERTS and all(n % 128 == 0 for n in (width, inner, shared)) and max(width, 4 * inner, 2 * shared) <= LARGEST
    return ids_TK.numel() > 0 and x_TD.is_contiguous() and x_TD.dtype == torch.bfloat16 and sizes


@moe_mx.implement(
    "ascend",
    name="npu_dynamic_mx_quant, npu_moe_init_routing_v2, npu_grouped_matmul (e4m3 x fp4), npu_swiglu_group_quant, npu_moe_finalize_routing",
    dtypes=(torch.bfloat16,),
    soc=("950",),
    needs=(MX_QUANT, ROUTING, GROUPED, SWIGLU_QUANT, QUANT_MATMUL, FINALIZE),
    when=_mx_when,
)
def _moe_mx(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    codes, scale = mx_quantise(x_TD)
    shared_h = swiglu_quantise(mx_matmul(codes, scale, shared_w13, shared_s13, torch.bfloat16), limit)
    shared_TD = mx_matmul(*shared_h, shared_w2, shared_s2, torch.bfloat16)
    rows, row_of, counts, row_scale = _sorted(codes, scale.view(torch.float8_e8m0fnu), ids_TK, w13.shape[0])
    gate_up = fp4_product(rows, row_scale.view(torch.uint8), w13, s13, counts)
    y_AD = fp4_product(*swiglu_quantise(gate_up, limit, counts), w2, s2, counts)
    return _summed(y_AD, row_of, weights_TK, shared_TD)
