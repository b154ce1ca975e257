"""Routed experts of dense weights: dispatch, the two products, sum. Nothing in it waits for the device, so that a step can be recorded.

Shapes as in ops/moe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

import backends.cuda
from backends.cuda.moe import dispatch
from backends.cuda_triton import experts
from backends.cuda_triton.launch import NEED, SOC
from ops.moe import moe_combine, moe_mlp

__all__ = ["backends"]

_combine = moe_combine.impls["cuda"].fn


def _fits(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    if ids_TK.dim() != 2 or not ids_TK.numel() or ids_TK.dtype != torch.int32 or x_TD.dim() != 2 or not x_TD.is_contiguous():
        return False
    routed = ids_TK.shape[0] == x_TD.shape[0] and weights_TK.shape == ids_TK.shape and weights_TK.dtype == torch.float32
    return routed and x_TD.dtype == torch.bfloat16 and experts.weights_fit(x_TD.shape[1], w13, w2, limit)


@moe_mlp.implement("cuda_triton", dtypes=experts.BF16, soc=SOC, needs=[NEED], when=_fits, note="bf16 rows and weights")
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    rows_AD, row_weight_A, counts_E, index_A = dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
    y_AD = experts.dense(rows_AD, row_weight_A, counts_E, w13, w2, limit=limit)
    return _combine(y_AD, index_A, tokens=ids_TK.shape[0], topk=ids_TK.shape[1])
