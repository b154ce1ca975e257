"""Experts: rows are sorted by npu_moe_init_routing_v2, multiplied by npu_grouped_matmul and activated by npu_clipped_swiglu.

The sum over a token's experts is in fp32, as the contract asks: npu_moe_finalize_routing would give it in the token's type.
Shapes as in ops/moe.py. Source: Ascend operator notes, section 9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.experts import grouped_experts
from ops.moe import moe_combine, moe_dispatch, moe_mlp
from ops.swiglu import clamped_swiglu

ROUTING, GROUPED, CLIPPED = "npu::npu_moe_init_routing_v2", "npu::npu_grouped_matmul", "npu::npu_clipped_swiglu"
HALVES = (torch.bfloat16, torch.float16)
BF16 = (torch.bfloat16,)
"""The grouped product alone rounds three times; in fp16 the RMS of these roundings was once above what the contract allows."""
OLDER = ("910b", "910_93")
MOST_EXPERTS, WIDEST = 1024, 65536
_GATHER, _SCATTER = 0, 1
Activation = Callable[[Tensor, float], Tensor]
_COUNTS = 1


def route(x_TD: Tensor, ids_TK: Tensor, experts: int, row_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert [A, D], their index int32 [A] (gather: the row of t*K + k; scatter: t*K + k of the row) and counts [E]."""
    rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x=x_TD,
        expert_idx=ids_TK,
        active_num=ids_TK.numel(),
        expert_capacity=-1,
        expert_num=experts,
        drop_pad_mode=0,
        expert_tokens_num_type=_COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=row_index,
    )
    return rows, index, counts


def grouped_product(rows_AK: Tensor, weight_ENK: Tensor, counts_E: Tensor, **quantised: Any) -> Tensor:
    """Rows sorted by expert times their expert's weight: [A, N]. The vendor's weight is [E, K, N]; ours goes in as a transposed view."""
    y: Tensor = torch.ops.npu.npu_grouped_matmul(
        x=[rows_AK],
        weight=[weight_ENK.transpose(1, 2)],
        group_list=counts_E,
        split_item=3,
        group_type=0,
        group_list_type=_COUNTS,
        act_type=0,
        **quantised,
    )[0]
    return y


def clipped_swiglu(gate_up_A2I: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), halves side by side; the vendor's defaults are those of another model."""
    h: Tensor = torch.ops.npu.npu_clipped_swiglu(x=gate_up_A2I, dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False)
    return h


def clamped_halves(gate_up_A2I: Tensor, limit: float) -> Tensor:
    """The same for chips without that op: both halves are clamped first, since npu_swiglu has no clamp."""
    gate, up = gate_up_A2I.chunk(2, -1)
    h: Tensor = torch.ops.npu.npu_swiglu(input=torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), -1), dim=-1)
    return h


@functools.cache
def representable(limit: float, dtype: torch.dtype) -> bool:
    """Whether clamping to `limit` in `dtype` is exact."""
    return float(torch.tensor(limit, dtype=dtype)) == limit


def _swiglu_when(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> bool:
    return row_weight is None and gate_up_T2I.shape[0] > 0 and gate_up_T2I.is_contiguous()


@clamped_swiglu.implement("ascend", name="npu_clipped_swiglu", dtypes=HALVES, soc=OLDER, needs=(CLIPPED,), when=_swiglu_when)
def _clamped_swiglu(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    return clipped_swiglu(gate_up_T2I, limit)


def _halves_when(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> bool:
    return _swiglu_when(gate_up_T2I, limit=limit, row_weight=row_weight) and representable(limit, gate_up_T2I.dtype)


@clamped_swiglu.implement(
    "ascend", name="clamp, npu_swiglu", dtypes=HALVES, soc=("950",), needs=("npu::npu_swiglu",), when=_halves_when
)  # fmt: skip
def _clamped_swiglu_950(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    return clamped_halves(gate_up_T2I, limit)


@moe_dispatch.implement(
    "ascend",
    name="npu_moe_init_routing_v2",
    needs=(ROUTING,),
    when=lambda x_TD, ids_TK, weights_TK, *, num_experts: ids_TK.numel() > 0 and x_TD.is_contiguous(),
)
def _moe_dispatch(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, index, counts = route(x_TD, ids_TK, num_experts, _SCATTER)
    return rows, weights_TK.flatten().index_select(0, index), counts, index


def _experts_when(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    return rows_AD.shape[0] > 0 and rows_AD.is_contiguous() and weights_fit(rows_AD, w13, w2)


def weights_fit(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether dense expert weights are within the limits of the grouped product and of the type of x."""
    return w13.dtype == x.dtype and w13.shape[0] <= MOST_EXPERTS and max(*w13.shape[1:], *w2.shape[1:]) < WIDEST


@grouped_experts.implement(
    "ascend", name="npu_grouped_matmul, npu_clipped_swiglu", dtypes=BF16, soc=OLDER, needs=(GROUPED, CLIPPED), when=_experts_when
)  # fmt: skip
def _grouped_experts(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float
) -> Tensor:  # fmt: skip
    h_AI = clipped_swiglu(grouped_product(rows_AD, w13, counts_E), limit)
    return grouped_product((h_AI * row_weight_A[:, None]).to(rows_AD.dtype), w2, counts_E)


def _halves_experts_when(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float
) -> bool:  # fmt: skip
    return _experts_when(rows_AD, row_weight_A, counts_E, w13, w2, limit=limit) and representable(limit, rows_AD.dtype)


@grouped_experts.implement(
    "ascend", name="npu_grouped_matmul, npu_swiglu", dtypes=BF16, soc=("950",), needs=(GROUPED, "npu::npu_swiglu"), when=_halves_experts_when
)  # fmt: skip
def _grouped_experts_950(
    rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float
) -> Tensor:  # fmt: skip
    h_AI = clamped_halves(grouped_product(rows_AD, w13, counts_E), limit)
    return grouped_product((h_AI * row_weight_A[:, None]).to(rows_AD.dtype), w2, counts_E)


@moe_combine.implement(
    "ascend",
    name="gather, fp32 sum",
    when=lambda rows_AD, row_index_A, *, tokens, topk: rows_AD.shape[0] == tokens * topk > 0,
    note="torch; npu_moe_finalize_routing sums in the token's type",
)
def _moe_combine(rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
    row_of_A = torch.empty_like(row_index_A).scatter_(0, row_index_A.long(), _numbers(row_index_A.shape[0], row_index_A.device))
    return rows_AD.index_select(0, row_of_A).view(tokens, topk, -1).sum(1, dtype=torch.float32)


@functools.lru_cache(maxsize=32)
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _mlp_when(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    return ids_TK.numel() > 0 and x_TD.is_contiguous() and weights_fit(x_TD, w13, w2)


def _mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float, activate: Activation) -> Tensor:
    rows, row_of_A, counts = route(x_TD, ids_TK, w13.shape[0], _GATHER)
    y_AD = grouped_product(activate(grouped_product(rows, w13, counts), limit), w2, counts)
    y_TKD = y_AD.index_select(0, row_of_A).view(*ids_TK.shape, -1)
    # the product with w2 is linear: the weight of a row may come after it, in fp32
    return torch.bmm(weights_TK[:, None], y_TKD.float())[:, 0]


@moe_mlp.implement(
    "ascend",
    name="npu_moe_init_routing_v2, npu_grouped_matmul, npu_clipped_swiglu, fp32 sum",
    dtypes=HALVES,
    soc=OLDER,
    needs=(ROUTING, GROUPED, CLIPPED),
    when=_mlp_when,
)
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    return _mlp(x_TD, ids_TK, weights_TK, w13, w2, limit, clipped_swiglu)


def _mlp_950_when(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    return _mlp_when(x_TD, ids_TK, weights_TK, w13, w2, limit=limit) and representable(limit, x_TD.dtype)


@moe_mlp.implement(
    "ascend",
    name="npu_moe_init_routing_v2, npu_grouped_matmul, npu_swiglu, fp32 sum",
    dtypes=HALVES,
    soc=("950",),
    needs=(ROUTING, GROUPED, "npu::npu_swiglu"),
    when=_mlp_950_when,
)
def _moe_mlp_950(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    return _mlp(x_TD, ids_TK, weights_TK, w13, w2, limit, clamped_halves)
