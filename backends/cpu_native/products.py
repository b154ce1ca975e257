"""Products with fp32 weights for few tokens: linear layers, gates, experts.

Shapes: x [T, K] or [T, G, K], w [N, K] or [G, N, K]; T tokens, K experts per token in the MoE ops, E experts, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, kernel, threads
from ops.gate import gate_hash, gate_topk
from ops.linear import grouped_linear, linear
from ops.moe import moe_mlp
from ops.swiglu import clamped_swiglu

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32"


def _linear_fits(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> bool:
    return (
        x.dim() == 2
        and 0 < x.shape[0] <= FEW
        and x.dtype == weight_NK.dtype == torch.float32
        and out_dtype in (None, torch.float32)
        and x.shape[1] == weight_NK.shape[1]
        and weight_NK.is_contiguous()
    )


@linear.implement("cpu_native", dtypes=F32, needs=[NEED], when=_linear_fits, note=_NOTE)
def _linear(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    x, (n, k) = x.contiguous(), weight_NK.shape
    y = x.new_empty(x.shape[0], n)
    kernel("v4_linear")(x.data_ptr(), weight_NK.data_ptr(), y.data_ptr(), x.shape[0], 1, n, k, threads())
    return y


def _grouped_fits(x_TGK: Tensor, weight_GNK: Tensor) -> bool:
    agree = x_TGK.shape[1] == weight_GNK.shape[0] and x_TGK.shape[2] == weight_GNK.shape[2]
    return agree and 0 < x_TGK.shape[0] <= FEW and x_TGK.dtype == weight_GNK.dtype == torch.float32 and weight_GNK.is_contiguous()


@grouped_linear.implement("cpu_native", dtypes=F32, needs=[NEED], when=_grouped_fits, note=_NOTE)
def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    x, (g, n, k) = x_TGK.contiguous(), weight_GNK.shape
    y = x.new_empty(x.shape[0], g, n)
    kernel("v4_linear")(x.data_ptr(), weight_GNK.data_ptr(), y.data_ptr(), x.shape[0], g, n, k, threads())
    return y


def _moe_fits(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    return (
        0 < x_TD.shape[0] <= FEW
        and ids_TK.shape[1] > 0
        and x_TD.dtype == w13.dtype == w2.dtype == torch.float32
        and w13.is_contiguous()
        and w2.is_contiguous()
        and ids_TK.shape == weights_TK.shape == (x_TD.shape[0], ids_TK.shape[1])
        and w13.shape == (w2.shape[0], 2 * w2.shape[2], x_TD.shape[1])
        and w2.shape[1] == x_TD.shape[1]
    )


@moe_mlp.implement("cpu_native", dtypes=F32, needs=[NEED], when=_moe_fits, note=_NOTE)
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    x, ids, weights = x_TD.contiguous(), ids_TK.to(torch.int32).contiguous(), weights_TK.float().contiguous()
    (tokens, topk), (experts, d, width) = ids.shape, w2.shape
    y = x.new_empty(tokens, d)
    failed = kernel("v4_moe")(
        x.data_ptr(), ids.data_ptr(), weights.data_ptr(), w13.data_ptr(), w2.data_ptr(), y.data_ptr(),
        tokens, topk, experts, d, width, limit, threads(),
    )  # fmt: skip
    if failed:
        raise ValueError(f"expert ids reach from {int(ids.min())} to {int(ids.max())}, expected 0..{experts - 1}")
    return y


def _swiglu_fits(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> bool:
    agree = gate_up_T2I.dim() == 2 and (row_weight is None or row_weight.shape == gate_up_T2I.shape[:1])
    return agree and 0 < gate_up_T2I.shape[0] <= FEW and gate_up_T2I.dtype == torch.float32


@clamped_swiglu.implement("cpu_native", dtypes=F32, needs=[NEED], when=_swiglu_fits, note=_NOTE)
def _clamped_swiglu(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    x, tokens, width = gate_up_T2I.contiguous(), gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    weight = None if row_weight is None else row_weight.float().contiguous()
    y = x.new_empty(tokens, width)
    kernel("v4_swiglu")(x.data_ptr(), None if weight is None else weight.data_ptr(), y.data_ptr(), tokens, width, limit)
    return y


def _gate_fits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> bool:
    agree = x_TD.shape[1] == weight_ED.shape[1] and bias_E.shape == weight_ED.shape[:1] and topk <= bias_E.shape[0]
    return agree and 0 < x_TD.shape[0] <= FEW and x_TD.dtype == weight_ED.dtype == bias_E.dtype == torch.float32


@gate_topk.implement("cpu_native", dtypes=F32, needs=[NEED], when=_gate_fits, note=_NOTE)
def _gate_topk(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    x, w, bias, (tokens, d) = x_TD.contiguous(), weight_ED.contiguous(), bias_E.contiguous(), x_TD.shape
    weights, ids = x.new_empty(tokens, topk), x.new_empty(tokens, topk, dtype=torch.int32)
    kernel("v4_gate_topk")(
        x.data_ptr(), w.data_ptr(), bias.data_ptr(), weights.data_ptr(), ids.data_ptr(), tokens, w.shape[0], d, topk, scale
    )
    return weights, ids


def _hash_fits(x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> bool:
    plain = x_TD.dtype == weight_ED.dtype == torch.float32 and tid2eid_VK.dtype == torch.int64
    agree = x_TD.shape[1] == weight_ED.shape[1] and token_ids_T.shape == x_TD.shape[:1]
    return plain and agree and 0 < x_TD.shape[0] <= FEW and tid2eid_VK.is_contiguous()


@gate_hash.implement("cpu_native", dtypes=F32, needs=[NEED], when=_hash_fits, note=_NOTE)
def _gate_hash(
    x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    x, w, tokens_T, (tokens, d) = x_TD.contiguous(), weight_ED.contiguous(), token_ids_T.long().contiguous(), x_TD.shape
    vocabulary, topk = tid2eid_VK.shape
    weights, ids = x.new_empty(tokens, topk), x.new_empty(tokens, topk, dtype=torch.int32)
    failed = kernel("v4_gate_hash")(
        x.data_ptr(), w.data_ptr(), tid2eid_VK.data_ptr(), tokens_T.data_ptr(), weights.data_ptr(), ids.data_ptr(),
        tokens, vocabulary, w.shape[0], d, topk, scale,
    )  # fmt: skip
    if failed:
        raise ValueError(
            f"gate_hash: token ids {tokens_T.tolist()} are not all in 0..{vocabulary - 1}, or their experts in 0..{w.shape[0] - 1}"
        )
    return weights, ids
