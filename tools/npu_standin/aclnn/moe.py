"""Choice of experts, routing, activation of the experts, writes into caches."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.aclnn import ACL_CODES, code, model, put
from tools.npu_standin.host import bridge

QUANT_MODES = {"static": 0, "dynamic": 1}
ROUND_MODES = {"rint": 0}
E8M0 = 293
_GATE = "k:i k_group:i group_count:i group_select_mode:i renorm:i norm_type:i out_flag:b factor:d eps:d weights:t ids:t scores:t"


def _gate(
    x: Tensor, bias: Tensor | None, input_ids: Tensor | None, tid2eid: Tensor | None, k: int, factor: float,
    weights: Tensor, ids: Tensor, scores: Tensor, **rest: object,
) -> None:  # fmt: skip
    results = model("npu::npu_moe_gating_top_k")(
        x, k, bias=bias, input_ids=input_ids, tid2eid=tid2eid, routed_scaling_factor=factor, **rest
    )
    put(results, weights, ids, scores)


@bridge("aclnnMoeGatingTopK", f"x:t bias:t {_GATE}")
def gating_top_k(**arguments: object) -> None:
    """npu_moe_gating_top_k by scores."""
    _gate(input_ids=None, tid2eid=None, **arguments)  # type: ignore[arg-type]


@bridge("aclnnMoeGatingTopKV2", f"x:t bias:t input_ids:t tid2eid:t {_GATE}")
def gating_top_k_hash(**arguments: object) -> None:
    """npu_moe_gating_top_k by token id."""
    _gate(**arguments)  # type: ignore[arg-type]


@bridge(
    "aclnnMoeInitRoutingV3",
    "x:t expert_idx:t scale:t offset:t active_num:i expert_capacity:i expert_num:i drop_pad_mode:i expert_tokens_num_type:i"
    " expert_tokens_num_flag:b quant_mode:i active_expert_range:I row_idx_type:i rows:t row_idx:t tokens:t row_scale:t",
)
def init_routing(
    x: Tensor, expert_idx: Tensor, scale: Tensor | None, rows: Tensor, row_idx: Tensor, tokens: Tensor, row_scale: Tensor, **rest: object
) -> None:  # fmt: skip
    """npu_moe_init_routing_v2; scales of fp8 codes travel as bytes that the descriptor calls e8m0."""
    if scale is not None and code(scale) == E8M0:
        scale = scale.view(torch.float8_e8m0fnu)
    put(model("npu::npu_moe_init_routing_v2")(x, expert_idx, scale=scale, **rest), rows, row_idx, tokens, row_scale)


@bridge(
    "aclnnMoeFinalizeRoutingV4",
    "rows:t row_idx:t skip1:t skip2:t bias:t scales:t experts:t unpermuted:t alpha1:t alpha2:t constant:t drop_pad_mode:i zero_range:I"
    " copy_range:I constant_range:I k:i y:t",
)
def finalize_routing(
    rows: Tensor, row_idx: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None, scales: Tensor | None,
    experts: Tensor | None, drop_pad_mode: int, k: int, y: Tensor, **rest: object,
) -> None:  # fmt: skip
    """npu_moe_finalize_routing; what its schema can not say must be absent."""
    if given := [name for name, value in rest.items() if value is not None]:
        raise NotImplementedError(f"aclnnMoeFinalizeRoutingV4 with {', '.join(given)}")
    put(
        model("npu::npu_moe_finalize_routing")(
            rows, skip1, skip2, bias, scales, row_idx, experts, drop_pad_mode=drop_pad_mode, k=k
        ),
        y,
    )


@bridge("aclnnMoeReRouting", "tokens:t counts:t scales:t count_type:i idx_type:i moved:t moved_scales:t index:t expert_counts:t")
def re_routing(
    tokens: Tensor, counts: Tensor, scales: Tensor | None, count_type: int, idx_type: int,
    moved: Tensor, moved_scales: Tensor | None, index: Tensor, expert_counts: Tensor,
) -> None:  # fmt: skip
    """npu_moe_re_routing."""
    results = model("npu::npu_moe_re_routing")(
        tokens, counts, per_token_scales=scales, expert_token_num_type=count_type, idx_type=idx_type
    )
    put(results, moved, moved_scales, index, expert_counts)


_DEQUANT = "x:t weight_scale:t activation_scale:t bias:t quant_scale:t quant_offset:t group_index:t activate_left:b quant_mode:s"


@bridge(
    "aclnnDequantSwigluQuantV2",
    f"{_DEQUANT} dst_type:w round_mode:s activate_dim:w swiglu_mode:w clamp_limit:d glu_alpha:d glu_bias:d y:t scale:t",
)
def dequant_swiglu_quant(
    x: Tensor, quant_mode: str, dst_type: int, round_mode: str, y: Tensor, scale: Tensor, **rest: object
) -> None:
    """npu_dequant_swiglu_quant."""
    results = model("npu::npu_dequant_swiglu_quant")(
        x, quant_mode=QUANT_MODES[quant_mode], dst_type=ACL_CODES + dst_type, round_mode=ROUND_MODES[round_mode], **rest
    )
    put(results, y, scale)


@bridge("aclnnDequantSwigluQuant", f"{_DEQUANT} y:t scale:t")
def dequant_swiglu_quant_first(x: Tensor, quant_mode: str, y: Tensor, scale: Tensor, **rest: object) -> None:
    """The first version of the kernel: no mode and no clamp reach it."""
    put(model("npu::npu_dequant_swiglu_quant")(x, quant_mode=QUANT_MODES[quant_mode], swiglu_mode=0, **rest), y, scale)


@bridge("aclnnClippedSwiglu", "x:t group_index:t dim:i alpha:d limit:d bias:d interleaved:b y:t")
def clipped_swiglu(x: Tensor, y: Tensor, **rest: object) -> None:
    """npu_clipped_swiglu."""
    put(model("npu::npu_clipped_swiglu")(x, **rest), y)


@bridge("aclnnSwiGlu", "x:t dim:i y:t")
def swiglu(x: Tensor, dim: int, y: Tensor) -> None:
    """npu_swiglu."""
    put(model("npu::npu_swiglu")(x, dim=dim), y)


@bridge(
    "aclnnSwigluMxQuant",
    "x:t group_index:t activate_dim:i activate_left:b swiglu_mode:i clamp_limit:d glu_alpha:d glu_bias:d group_mode:i axis:i dst_type:i"
    " round_mode:s scale_alg:i max_dtype_value:d y:t scale:t",
)
def swiglu_mx_quant(x: Tensor, dst_type: int, y: Tensor, scale: Tensor, **rest: object) -> None:
    """npu_swiglu_mx_quant."""
    put(model("npu::npu_swiglu_mx_quant")(x, dst_type=ACL_CODES + dst_type, **rest), y, scale)


@bridge("aclnnScatterNdUpdate", "table:t indices:t updates:t")
def scatter_nd_update(table: Tensor, indices: Tensor, updates: Tensor) -> None:
    """npu_scatter_nd_update_, in place."""
    model("npu::npu_scatter_nd_update_")(table, indices, updates)
