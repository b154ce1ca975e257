"""Sorting tokens to experts without reading a value on the host, so that a decode step can be captured as a graph. Plain torch.

The cpu backend's version asks for the smallest and largest expert, and its bincount for the largest: both wait for the device.
Shapes as in ops/moe.py: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC
from ops.moe import moe_dispatch


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
