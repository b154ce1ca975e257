"""All experts of a layer over the hub's FP4 and FP8 weights with MXFP8 activations: an expert at a time, weights expanded when it runs.

Shapes: x [T, D], ids and weights [T, K], rows [A = T*K, D], w13 [E, 2I, D], w2 [E, D, I], shared_w13 [2J, D], shared_w2 [D, J].
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu import moe
from backends.cpu.experts import own_fp32, swiglu_
from backends.cpu.linear import matmul_nt
from ops.experts_math import segments
from ops.moe import moe_combine, moe_dispatch
from ops.moe_layer import moe_mx
from ops.quant import dequant_fp8, dequant_fp8_block, dequant_mxfp4, quant_mxfp8

__all__ = ["moe"]


def _roundtrip(x_AK: Tensor) -> Tensor:
    codes, scale = quant_mxfp8.impls["cpu"].fn(x_AK)
    back: Tensor = dequant_fp8.impls["cpu"].fn(codes, scale, group=32, dtype=torch.float32)
    return back


def _expert(x_AD: Tensor, w13: Tensor, w2: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """One expert on rows that are rounded already, in fp32; gate, up, activation and result pass through `dtype`."""
    gate_up = own_fp32(matmul_nt(x_AD, w13).to(dtype), copy=False)
    return matmul_nt(_roundtrip(swiglu_(gate_up, limit, None).to(dtype)), w2).to(dtype)


@moe_mx.implement("cpu")
def _moe_mx(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    wide, dtype = torch.float32, x_TD.dtype
    x = _roundtrip(x_TD)
    rows, row_weight, counts, index = moe_dispatch.impls["cpu"].fn(x, ids_TK, weights_TK, num_experts=w13.shape[0])
    fp4, fp8 = dequant_mxfp4.impls["cpu"].fn, dequant_fp8_block.impls["cpu"].fn
    y_AD = torch.empty_like(rows)
    for e, i, j in segments(counts):
        y = _expert(rows[i:j], fp4(w13[e], s13[e], dtype=wide), fp4(w2[e], s2[e], dtype=wide), limit, dtype)
        y_AD[i:j] = y * row_weight[i:j, None]
    routed: Tensor = moe_combine.impls["cpu"].fn(y_AD, index, tokens=ids_TK.shape[0], topk=ids_TK.shape[1])
    shared = _expert(x, fp8(shared_w13, shared_s13, dtype=wide), fp8(shared_w2, shared_s2, dtype=wide), limit, dtype)
    return (routed + shared).to(dtype)
