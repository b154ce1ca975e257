"""Putting rows that arrive by rank into the order of experts. Shapes: A rows, H channels, N ranks, L experts of this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, require_shape, undefined


@model("npu::npu_moe_re_routing")
def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that lie by rank, then expert, put by expert, then rank: (tokens, scales, source row int32 [A], counts [L]).

    expert_token_num_per_rank [N, L] counts. Scales are undefined when none were given.
    """
    op = "npu_moe_re_routing"
    require_shape(op, "tokens", tokens, None, None)
    require_dtype(op, "expert_token_num_per_rank", expert_token_num_per_rank, torch.int32, torch.int64)
    require_shape(op, "expert_token_num_per_rank", expert_token_num_per_rank, None, None)
    require(
        expert_token_num_type == 1 and idx_type == 0 and tokens_dtype is None,
        op,
        "another type of counts or index",
        "1 (counts), 0 (gather)",
    )
    ranks, experts = expert_token_num_per_rank.shape
    counts = expert_token_num_per_rank.long().flatten()
    require(int(counts.sum()) <= tokens.shape[0], op, f"counts of {int(counts.sum())} rows", f"at most {tokens.shape[0]}")
    owner = torch.repeat_interleave(torch.arange(ranks * experts) % experts, counts)
    order = torch.sort(owner, stable=True).indices
    used = order.numel()
    rows, index, scales = (
        undefined(tokens.shape, tokens.dtype),
        undefined((tokens.shape[0],), torch.int32),
        undefined((tokens.shape[0],), torch.float32),
    )
    rows[:used], index[:used] = tokens[order], order.to(torch.int32)
    if per_token_scales is not None:
        require_dtype(op, "per_token_scales", per_token_scales, torch.float32)
        require_shape(op, "per_token_scales", per_token_scales, tokens.shape[0])
        scales[:used] = per_token_scales[order]
    return rows, scales, index, expert_token_num_per_rank.sum(0).to(expert_token_num_per_rank.dtype)
