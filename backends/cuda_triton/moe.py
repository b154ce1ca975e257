"""Sorting tokens to experts, and the whole of dense experts, without reading a value on the host: a decode step can be captured.

The cpu backend's version asks for the smallest and largest expert, and its bincount for the largest: both wait for the device.
The one of dense experts (moe_mlp) reads the numbers of a single token's experts and the counts of several.
Shapes as in ops/moe.py: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

import backends.cuda
from backends.cuda_triton import experts
from backends.cuda_triton.launch import FLOATS, NEED, SOC
from ops.moe import moe_combine, moe_dispatch, moe_mlp

__all__ = ["backends"]

_combine = moe_combine.impls["cuda"].fn


def _fits(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> bool:
    if x_TD.dim() != 2 or x_TD.dtype not in FLOATS or ids_TK.dim() != 2 or ids_TK.dtype != torch.int32 or not ids_TK.numel():
        return False
    weights = weights_TK.shape == ids_TK.shape and weights_TK.dtype == torch.float32
    return weights and ids_TK.shape[0] == x_TD.shape[0] and num_experts >= 1


@moe_dispatch.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_fits, note="sorted and counted on the device")
def _moe_dispatch(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts_A, order_A = torch.sort(ids_TK.flatten(), stable=True)
    # an id that no expert has ends the program on the device, as an index out of range does there
    torch._assert_async(((experts_A[:1] >= 0) & (experts_A[-1:] < num_experts)).all(), "moe_dispatch: expert ids outside 0..E-1")
    edges = torch.arange(num_experts + 1, dtype=torch.int32, device=ids_TK.device)
    counts_E = torch.searchsorted(experts_A, edges).diff()
    tokens_A = order_A.div(ids_TK.shape[1], rounding_mode="floor")
    return x_TD.index_select(0, tokens_A), weights_TK.flatten().index_select(0, order_A), counts_E, order_A.to(torch.int32)


def _mlp_fits(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    routed = w13.dim() == 3 and _fits(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
    return routed and x_TD.dtype == torch.bfloat16 and experts.weights_fit(x_TD.shape[1], w13, w2, limit)


@moe_mlp.implement("cuda_triton", dtypes=experts.BF16, soc=SOC, needs=[NEED], when=_mlp_fits, note="bf16 rows and weights")
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    rows_AD, row_weight_A, counts_E, index_A = _moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
    y_AD = experts.dense(rows_AD, row_weight_A, counts_E, w13, w2, limit=limit)
    return _combine(y_AD, index_A, tokens=ids_TK.shape[0], topk=ids_TK.shape[1])
