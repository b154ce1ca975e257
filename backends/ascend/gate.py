"""Expert gates: logits by an fp32 product, then score, choice and weights by npu_moe_gating_top_k.

The logits must be fp32: the op returns weights in the type of its input. norm_type 2 is sqrt(softplus). Shapes as in ops/gate.py.
Source: Ascend operator notes, section 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.gate import gate_hash, gate_topk

GATING = "npu::npu_moe_gating_top_k"
MOST_EXPERTS, MOST_CHOSEN = 2048, 64
_SQRT_SOFTPLUS = 2
# the contract has no epsilon; this one is below the rounding of any sum of scores that matters
_EPSILON = 1e-20


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return torch.nn.functional.linear(x_TD.float(), weight_ED.float())


def _gate(logits_TE: Tensor, k: int, scale: float, **chosen_by: Tensor) -> tuple[Tensor, Tensor]:
    fixed: dict[str, Any] = {"k_group": 1, "group_count": 1, "group_select_mode": 0, "renorm": 0, "norm_type": _SQRT_SOFTPLUS, "out_flag": False}
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(
        x=logits_TE, k=k, routed_scaling_factor=scale, eps=_EPSILON, **fixed, **chosen_by
    )  # fmt: skip
    return weights, ids


@gate_topk.implement(
    "ascend",
    name="npu_moe_gating_top_k",
    needs=(GATING,),
    when=lambda x_TD, weight_ED, bias_E, *, topk, scale: weight_ED.shape[0] <= MOST_EXPERTS and topk <= MOST_CHOSEN,
)
def _gate_topk(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    return _gate(_logits(x_TD, weight_ED), topk, scale, bias=bias_E)


def _hash_when(x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> bool:
    return weight_ED.shape[0] <= MOST_EXPERTS and tid2eid_VK.shape[1] <= MOST_CHOSEN and tid2eid_VK.dtype == torch.int32


@gate_hash.implement("ascend", name="npu_moe_gating_top_k", needs=(f"{GATING}(tid2eid)",), when=_hash_when)
def _gate_hash(x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    k = tid2eid_VK.shape[1]
    return _gate(_logits(x_TD, weight_ED), k, scale, input_ids=token_ids_T.long(), tid2eid=tid2eid_VK)
