"""Mixture of experts on the CPU. Importing this module registers every MoE op, those of gate.py and experts.py included.

moe_mlp sorts the rows once, gathers each expert's rows only when that expert runs and adds its outputs to the tokens, so that
nothing of size T*K is held; a single token skips the sorting and walks through its experts.

Shapes: x [T, D], ids and weights [T, K], rows [A = T*K, D], w13 [E, 2I, D], w2 [E, D, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu import gate
from backends.cpu.experts import dense_expert, own_fp32, swiglu_
from backends.cpu.linear import matmul_nt
from ops.experts_math import segments
from ops.moe import moe_combine, moe_dispatch, moe_mlp

__all__ = ["gate"]


def _sorted_rows(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(flat index t*K + k of each row sorted by expert, rows per expert); ValueError for ids outside 0..num_experts-1."""
    flat = ids_TK.flatten()
    experts, order = torch.sort(flat, stable=True)
    if flat.numel() and (int(experts[0]) < 0 or int(experts[-1]) >= num_experts):
        raise ValueError(f"expert ids reach from {int(experts[0])} to {int(experts[-1])}, expected 0..{num_experts - 1}")
    return order, torch.bincount(flat, minlength=num_experts)


@moe_dispatch.implement("cpu")
def _moe_dispatch(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order_A, counts_E = _sorted_rows(ids_TK, num_experts)
    tokens_A = order_A.div(max(ids_TK.shape[1], 1), rounding_mode="floor")
    return x_TD.index_select(0, tokens_A), weights_TK.flatten()[order_A], counts_E, order_A.to(torch.int32)


@moe_combine.implement("cpu")
def _moe_combine(rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
    if not row_index_A.numel():
        return rows_AD.new_zeros(tokens, rows_AD.shape[1], dtype=torch.float32)
    index, order = torch.sort(row_index_A)
    starts = torch.searchsorted(index, torch.arange(tokens, dtype=index.dtype, device=index.device) * topk)
    # sums each token's rows in fp32 and in the order given, without a gathered copy
    return torch.nn.functional.embedding_bag(order, rows_AD.float(), starts, mode="sum")


def _one_token(x_1D: Tensor, ids_K: Tensor, weights_K: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    experts = ids_K.tolist()
    gate_up = torch.cat([matmul_nt(x_1D, w13[e].to(x_1D.dtype)) for e in experts])
    h = swiglu_(own_fp32(gate_up, copy=False), limit, weights_K).to(x_1D.dtype)
    y = own_fp32(matmul_nt(h[:1], w2[experts[0]].to(x_1D.dtype)), copy=False)
    for k, e in enumerate(experts[1:], 1):
        y += matmul_nt(h[k : k + 1], w2[e].to(x_1D.dtype))
    return y


def _many_tokens(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    order_A, counts_E = _sorted_rows(ids_TK, w13.shape[0])
    tokens_A, weights_A = order_A.div(ids_TK.shape[1], rounding_mode="floor"), weights_TK.flatten()[order_A]
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    for e, i, j in segments(counts_E):
        rows = x_TD.index_select(0, tokens_A[i:j])
        rows = dense_expert(rows, weights_A[i:j], w13[e].to(rows.dtype), w2[e].to(rows.dtype), limit)
        y_TD.index_add_(0, tokens_A[i:j], rows.float())
    return y_TD


@moe_mlp.implement("cpu")
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    tokens, topk = ids_TK.shape
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, w13.dtype))
    if not tokens or not topk:
        return x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    if tokens == 1:
        return _one_token(x_TD, ids_TK[0], weights_TK[0], w13, w2, limit)
    return _many_tokens(x_TD, ids_TK, weights_TK, w13, w2, limit)
