"""Products with fp32 weights for few tokens: linear layers, gates, experts.

Shapes: x [T, K] or [T, G, K], w [N, K] or [G, N, K]; T tokens, K experts per token in the MoE ops, E experts, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, native
from ops.gate import gate_hash, gate_topk
from ops.linear import grouped_linear, linear
from ops.moe import moe_mlp
from ops.swiglu import clamped_swiglu

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32"


def _linear_fits(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> bool:
    return native().linear(True, x, weight_NK, out_dtype)


@linear.implement("cpu_native", dtypes=F32, needs=[NEED], when=_linear_fits, note=_NOTE)
def _linear(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    return native().linear(False, x, weight_NK, out_dtype)


def _grouped_fits(x_TGK: Tensor, weight_GNK: Tensor) -> bool:
    return native().grouped_linear(True, x_TGK, weight_GNK)


@grouped_linear.implement("cpu_native", dtypes=F32, needs=[NEED], when=_grouped_fits, note=_NOTE)
def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    return native().grouped_linear(False, x_TGK, weight_GNK)


def _moe_fits(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> bool:
    return native().moe_mlp(True, x_TD, ids_TK, weights_TK, w13, w2, limit)


@moe_mlp.implement("cpu_native", dtypes=F32, needs=[NEED], when=_moe_fits, note=_NOTE)
def _moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    if (y_TD := native().moe_mlp(False, x_TD, ids_TK, weights_TK, w13, w2, limit)) is None:
        raise ValueError(f"expert ids reach from {int(ids_TK.min())} to {int(ids_TK.max())}, expected 0..{w2.shape[0] - 1}")
    return y_TD


def _swiglu_fits(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> bool:
    return native().clamped_swiglu(True, gate_up_T2I, limit, row_weight)


@clamped_swiglu.implement("cpu_native", dtypes=F32, needs=[NEED], when=_swiglu_fits, note=_NOTE)
def _clamped_swiglu(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    return native().clamped_swiglu(False, gate_up_T2I, limit, row_weight)


def _gate_fits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> bool:
    return native().gate_topk(True, x_TD, weight_ED, bias_E, topk, scale)


@gate_topk.implement("cpu_native", dtypes=F32, needs=[NEED], when=_gate_fits, note=_NOTE)
def _gate_topk(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    return native().gate_topk(False, x_TD, weight_ED, bias_E, topk, scale)


def _hash_fits(x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> bool:
    return native().gate_hash(True, x_TD, weight_ED, tid2eid_VK, token_ids_T, scale)


@gate_hash.implement("cpu_native", dtypes=F32, needs=[NEED], when=_hash_fits, note=_NOTE)
def _gate_hash(
    x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    if (chosen := native().gate_hash(False, x_TD, weight_ED, tid2eid_VK, token_ids_T, scale)) is None:
        found, (vocabulary, experts) = token_ids_T.tolist(), (tid2eid_VK.shape[0], weight_ED.shape[0])
        raise ValueError(f"gate_hash: token ids {found} are not all in 0..{vocabulary - 1}, or their experts in 0..{experts - 1}")
    return chosen
