"""The indexer's choice: the vendor's scores and top-k over bf16 keys, with weights in fp32.

Only cann_ops_transformer.lightning_indexer meets the contract: the quantised forms round queries and keys to int8 or fp8 first, and the
wheel's npu_lightning_indexer knows no compression ratio. Its lengths of keys are compressed ones, with the tokens left over beside.
Shapes as in ops/indexer.py. Source: Ascend operator notes, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.ascend.hoist import ByValue
from backends.ascend.lengths import Lengths
from backends.ascend.limits import python_call
from backends.ascend.probe import python_function
from ops.indexer import index_topk

LIGHTNING = "cann_ops_transformer.lightning_indexer"
WIDTH, HEADS, MOST = 128, 64, 2048
_CAUSAL = 3
_metadata = ByValue()


def _when(
    q_THd: Tensor, w_TH: Tensor, key_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, ratio: int, topk: int
) -> bool:  # fmt: skip
    rows = key_cache.shape[1]
    sizes = q_THd.shape[1:] == (HEADS, WIDTH) and topk <= MOST and ratio & (ratio - 1) == 0 and ratio <= 128
    keys = key_cache.dtype == q_THd.dtype and rows % 16 == 0 and rows <= 1024 and key_cache.is_contiguous()
    return q_THd.shape[0] > 0 and sizes and keys and q_THd.is_contiguous()


@index_topk.implement("ascend", name=LIGHTNING, dtypes=(torch.bfloat16, torch.float16), needs=(LIGHTNING, f"{LIGHTNING}_metadata"), when=_when)
def _index_topk(
    q_THd: Tensor, w_TH: Tensor, key_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, ratio: int, topk: int
) -> Tensor:  # fmt: skip
    lengths = Lengths(cu_seqlens, start_pos, q_THd.device)
    alike = {
        "topk": topk,
        "cu_seqlens_q": lengths.cu_seqlens,
        "cu_seqlens_k": None,
        "seqused_q": None,
        "seqused_k": lengths.compressed(ratio),
        "cmp_residual_k": lengths.residual(ratio),
        "max_seqlen_q": lengths.longest,
        "layout_q": "TND",
        "layout_k": "PA_BBND",
        "mask_mode": _CAUSAL,
        "cmp_ratio": ratio,
    }
    about = {"num_heads_q": HEADS, "num_heads_k": 1, "head_dim": WIDTH, "batch_size": lengths.batch, "max_seqlen_k": max(lengths.ends_host) // ratio}
    metadata = _metadata(
        (q_THd.device, topk, ratio), (cu_seqlens, start_pos), lambda: _function(f"{LIGHTNING}_metadata")(**about, **alike)
    )  # fmt: skip
    found = _function(LIGHTNING)(
        q=q_THd,
        k=key_cache[:, :, None],
        w=w_TH,
        block_table=lengths.there("keys", block_table),
        output_idx_offset=None,
        metadata=metadata,
        return_value=0,
        **alike,
    )
    index: Tensor = found[0]
    return index.view(q_THd.shape[0], topk)


def _function(name: str) -> Callable[..., Any]:
    package, _, function = name.partition(".")
    call = python_function(package, function)
    if not callable(call):
        raise LookupError(f"{name} was there when the model was bound and is not now")
    return python_call(name, call)
