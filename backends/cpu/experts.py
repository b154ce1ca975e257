"""Experts on the CPU: one pair of matrix products per expert that received rows.

Weights of another type than the rows are widened, packed ones are expanded to fp32, one expert at a time.

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E], gate_up [A, 2I].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backends.cpu import quant
from backends.cpu.linear import matmul_nt
from ops.experts import grouped_experts
from ops.experts_int8 import grouped_experts_int8
from ops.experts_math import ACTIVATION_GROUP, segments
from ops.experts_quant import grouped_experts_fp4, grouped_experts_fp8
from ops.quant import dequant_fp8, dequant_fp8_block, dequant_int8, dequant_mxfp4, quant_fp8, quant_int8
from ops.swiglu import clamped_swiglu

__all__ = ["dense_expert", "own_fp32", "quant", "swiglu_"]

_quant_fp8, _dequant_fp8 = quant_fp8.impls["cpu"].fn, dequant_fp8.impls["cpu"].fn
_quant_int8, _dequant_int8 = quant_int8.impls["cpu"].fn, dequant_int8.impls["cpu"].fn
_dequant_fp8_block, _dequant_mxfp4 = dequant_fp8_block.impls["cpu"].fn, dequant_mxfp4.impls["cpu"].fn


def swiglu_(gate_up: Tensor, limit: float, row_weight: Tensor | None) -> Tensor:
    """Clamped SwiGLU [A, I] of fp32 gate_up [A, 2I], whose second half it overwrites."""
    gate, up = gate_up.chunk(2, -1)
    h = torch.nn.functional.silu(gate.clamp_max(limit), inplace=True).mul_(up.clamp_(-limit, limit))
    return h if row_weight is None else h.mul_(row_weight[:, None])


def own_fp32(x: Tensor, copy: bool) -> Tensor:
    """x in fp32; with `copy` never x itself, so that it may be overwritten."""
    return x.to(torch.float32, copy=copy)


@clamped_swiglu.implement("cpu")
def _clamped_swiglu(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    return swiglu_(own_fp32(gate_up_T2I, copy=True), limit, row_weight).to(gate_up_T2I.dtype)


def dense_expert(x: Tensor, row_weight: Tensor, w13_e: Tensor, w2_e: Tensor, limit: float) -> Tensor:
    """One expert on its rows [a, D]; x and both weights of one type, which the result has too."""
    h = swiglu_(own_fp32(matmul_nt(x, w13_e), copy=False), limit, row_weight)
    return matmul_nt(h.to(x.dtype), w2_e)


@grouped_experts.implement("cpu")
def _grouped_experts(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    wide = torch.promote_types(rows_AD.dtype, w13.dtype)
    x_AD = rows_AD.to(wide)
    y_AD = torch.empty_like(rows_AD)
    for e, i, j in segments(counts_E):
        y_AD[i:j] = dense_expert(x_AD[i:j], row_weight_A[i:j], w13[e].to(wide), w2[e].to(wide), limit)
    return y_AD


def _roundtrip(x_AK: Tensor) -> Tensor:
    q, scale = _quant_fp8(x_AK, group=ACTIVATION_GROUP)
    return _dequant_fp8(q, scale, group=ACTIVATION_GROUP, dtype=torch.float32)


def _packed_experts(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Callable[[int], Tensor],
    w2: Callable[[int], Tensor],
    limit: float,
    trip: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    x_AD = trip(rows_AD) if trip else rows_AD.float()
    y_AD = torch.empty_like(rows_AD)
    for e, i, j in segments(counts_E):
        gate_up = matmul_nt(x_AD[i:j], w13(e)).to(rows_AD.dtype)  # the published code rounds both products to bf16
        h = swiglu_(own_fp32(gate_up, copy=False), limit, row_weight_A[i:j]).to(rows_AD.dtype)
        y_AD[i:j] = matmul_nt(trip(h) if trip else h.float(), w2(e))
    return y_AD


@grouped_experts_fp4.implement("cpu")
def _grouped_experts_fp4(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    def first(e: int) -> Tensor:
        return _dequant_mxfp4(w13[e], s13[e], dtype=torch.float32)

    def second(e: int) -> Tensor:
        return _dequant_mxfp4(w2[e], s2[e], dtype=torch.float32)

    return _packed_experts(rows_AD, row_weight_A, counts_E, first, second, limit, _roundtrip if quantize else None)


@grouped_experts_fp8.implement("cpu")
def _grouped_experts_fp8(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    def first(e: int) -> Tensor:
        halves = zip(w13[e].chunk(2), s13[e].chunk(2), strict=True)
        return torch.cat([_dequant_fp8_block(w, s, dtype=torch.float32) for w, s in halves])

    def second(e: int) -> Tensor:
        return _dequant_fp8_block(w2[e], s2[e], dtype=torch.float32)

    return _packed_experts(rows_AD, row_weight_A, counts_E, first, second, limit, _roundtrip if quantize else None)


def _roundtrip_rows(x_AK: Tensor) -> Tensor:
    return _dequant_int8(*_quant_int8(x_AK), dtype=torch.float32)


@grouped_experts_int8.implement("cpu")
def _grouped_experts_int8(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    def first(e: int) -> Tensor:
        return w13[e].float().mul_(s13[e][:, None])

    def second(e: int) -> Tensor:
        return w2[e].float().mul_(s2[e][:, None])

    return _packed_experts(rows_AD, row_weight_A, counts_E, first, second, limit, _roundtrip_rows if quantize else None)
