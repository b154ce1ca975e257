"""Expert parallel dispatch and combine. The host replaces global_bs = 0 by BS times the number of ranks."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import model, put
from tools.npu_standin.host import bridge

_RANKS = (
    "group_ep:s ep_world_size:i ep_rank_id:i moe_expert_num:i group_tp:s tp_world_size:i tp_rank_id:i expert_shard_type:i"
    " shared_expert_num:i shared_expert_rank_num:i"
)


@bridge(
    "aclnnMoeDistributeDispatchV4",
    f"x:t expert_ids:t scales:t x_active_mask:t expert_scales:t elastic_info:t performance_info:t {_RANKS} quant_mode:i global_bs:i"
    " expert_token_nums_type:i comm_alg:s zero_expert_num:i copy_expert_num:i const_expert_num:i rows:t row_scales:t assist:t counts:t"
    " ep_counts:t tp_counts:t row_weights:t",
)
def dispatch(
    x: Tensor, expert_ids: Tensor, rows: Tensor, row_scales: Tensor, assist: Tensor, counts: Tensor, ep_counts: Tensor, tp_counts: Tensor,
    row_weights: Tensor, **rest: object,
) -> None:  # fmt: skip
    """npu_moe_distribute_dispatch_v2. The host allocates row weights also where no expert_scales came; nothing writes them then."""
    results = model("npu::npu_moe_distribute_dispatch_v2")(x, expert_ids, **rest)
    put(results, rows, row_scales, assist, counts, ep_counts, tp_counts, row_weights if rest["expert_scales"] is not None else None)


@bridge(
    "aclnnMoeDistributeCombineV4",
    "rows:t expert_ids:t assist:t ep_counts:t expert_scales:t tp_send_counts:t x_active_mask:t activation_scale:t weight_scale:t group_list:t"
    " expand_scales:t shared_expert_x:t elastic_info:t ori_x:t const_expert_alpha_1:t const_expert_alpha_2:t const_expert_v:t"
    f" performance_info:t {_RANKS} global_bs:i out_dtype:i comm_quant_mode:i group_list_type:i comm_alg:s zero_expert_num:i"
    " copy_expert_num:i const_expert_num:i y:t",
)
def combine(
    rows: Tensor, expert_ids: Tensor, assist: Tensor, ep_counts: Tensor, expert_scales: Tensor, activation_scale: Tensor | None,
    weight_scale: Tensor | None, group_list: Tensor | None, out_dtype: int, group_list_type: int, y: Tensor, **rest: object,
) -> None:  # fmt: skip
    """npu_moe_distribute_combine_v2; what its schema can not say must be absent."""
    if activation_scale is not None or weight_scale is not None or group_list is not None or out_dtype or group_list_type:
        raise NotImplementedError("aclnnMoeDistributeCombineV4 with scales or group_list")
    put(model("npu::npu_moe_distribute_combine_v2")(rows, expert_ids, assist, ep_counts, expert_scales, **rest), y)
