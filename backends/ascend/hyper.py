"""Hyper-connections: the streams are mixed by the vendor's op; their coefficients are computed in fp32 by plain torch.

custom.npu_hc_pre multiplies in HF32 (10 bits of the weights), outside the bound of hc_pre: it is not offered here. The wheel's
npu_mhc_post is not either: the notes do not say over which index of h_res it sums.
Source: Ascend operator notes, section 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.hyper import hc_post

HC_POST = "custom::npu_hc_post"
WIDTHS = (4096, 7168)
STREAMS = 4


def _hc_post_when(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> bool:
    tokens, n, width = streams_TnD.shape
    contiguous = all(t.is_contiguous() for t in (y_TD, streams_TnD, post_Tn, comb_Tnn))
    return tokens > 0 and n == STREAMS and width in WIDTHS and contiguous


@hc_post.implement("ascend", name=HC_POST, dtypes=(torch.bfloat16,), needs=(HC_POST,), when=_hc_post_when)
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    mixed: Tensor = torch.ops.custom.npu_hc_post(x=y_TD, residual=streams_TnD, post=post_Tn, comb=comb_Tnn)
    return mixed
