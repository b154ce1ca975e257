"""Choice of experts. Shapes: T tokens, E experts, k chosen ones, V token ids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tools.npu_standin.models import model, require, require_dtype, require_shape, undefined

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 0, 1, 2


def top_lowest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest per row, largest first, equal ones by lowest index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def _gating(
    op: str, x: Tensor, k: int, bias: Tensor | None, input_ids: Tensor | None, tid2eid: Tensor | None, group: tuple[int, int, int],
    renorm: int, norm_type: int, out_flag: bool, factor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    require_shape(op, "x", x, None, None)
    require_dtype(op, "x", x, torch.float32, torch.bfloat16, torch.float16)
    tokens, experts = x.shape
    require(experts <= 2048, op, f"E = {experts}", "E at most 2048")
    require(1 <= k <= min(64, experts), op, f"k = {k} of {experts}", "1 <= k <= 64 and k <= E")
    require(
        norm_type in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS), op, f"norm_type {norm_type}", "0 softmax, 1 sigmoid, 2 sqrt(softplus)"
    )
    require(renorm == 0, op, f"renorm {renorm}", "renorm 0")
    require(
        group == (1, 1, 0),
        op,
        f"k_group, group_count, group_select_mode {group}",
        "1, 1, 0 (V4 has no groups; others are not modelled)",
    )
    if bias is not None:
        require_shape(op, "bias", bias, experts)
        require_dtype(op, "bias", bias, x.dtype)
    require((input_ids is None) == (tid2eid is None), op, "one of input_ids and tid2eid", "both or neither")
    wide = x.float()
    if norm_type == SOFTMAX:
        scores = wide.softmax(-1)
    elif norm_type == SIGMOID:
        scores = wide.sigmoid()
    else:
        scores = softplus(wide).sqrt()
    if input_ids is not None and tid2eid is not None:
        ids = _hash_ids(op, input_ids, tid2eid, tokens, k, experts)
    else:
        ids = top_lowest(scores if bias is None else scores + bias.float(), k)
    weights = scores.gather(1, ids)
    if norm_type != SOFTMAX:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    out = scores if out_flag else undefined(scores.shape, torch.float32)
    return (weights * factor).to(x.dtype), ids.to(torch.int32), out


def _hash_ids(op: str, input_ids: Tensor, tid2eid: Tensor, tokens: int, k: int, experts: int) -> Tensor:
    require_dtype(op, "input_ids", input_ids, *((torch.int64,) if op.startswith("custom") else (torch.int32, torch.int64)))
    require_dtype(op, "tid2eid", tid2eid, torch.int32)
    require_shape(op, "input_ids", input_ids, tokens)
    require_shape(op, "tid2eid", tid2eid, None, k)
    inside = bool(((input_ids >= 0) & (input_ids < tid2eid.shape[0])).all())
    require(inside, op, "a token id outside the table", f"0 <= id < {tid2eid.shape[0]}")
    ids = tid2eid[input_ids.long()].long()
    require(bool(((ids >= 0) & (ids < experts)).all()), op, "an expert id outside x", f"0 <= id < {experts}")
    return ids


@model("npu::npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, k] in the type of x, ids int32 [T, k], scores fp32 [T, E] (undefined without out_flag). bias moves the choice only.

    norm_type 2 is sqrt(softplus), whatever its name; weights are divided by (sum + eps) for 1 and 2, not for softmax.
    """
    group = (k_group, group_count, group_select_mode)
    return _gating(
        "npu_moe_gating_top_k", x, k, bias, input_ids, tid2eid, group, renorm, norm_type, out_flag, routed_scaling_factor, eps
    )


@model("custom::npu_moe_gating_top_k")
def custom_npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with another order of keywords; token ids int64 only, no empty input."""
    op = "custom.npu_moe_gating_top_k"
    require(x.shape[0] > 0, op, "T = 0", "at least one token")
    group = (k_group, group_count, group_select_mode)
    return _gating(op, x, k, bias, input_ids, tid2eid, group, renorm, norm_type, out_flag, routed_scaling_factor, eps)
