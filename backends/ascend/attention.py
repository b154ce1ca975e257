"""Attention over window and compressed rows by the vendor's ops for a key that is its own value, with a sink per head.

Both take paged caches [blocks, P, 1, 512] as they are, and metadata that depends on lengths and kind of layer only: it is made once per
step and kind. Their conventions of lengths differ. Shapes as in ops/attention.py. Source: Ascend operator notes, section 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.ascend.hoist import ByValue
from backends.ascend.lengths import Lengths
from ops.attention import sparse_attention

SHAREDKV, FLASH_MLA = "custom::npu_sparse_attn_sharedkv", "cann_ops_transformer::sparse_flash_mla"
CHANNELS = 512
_HALVES = (torch.bfloat16, torch.float16)
_BAND, _CAUSAL, _NONE = 4, 3, 0
_metadata = ByValue()


def _paged(q_THC: Tensor, cache: Tensor | None) -> bool:
    """Whether a cache is one that the ops can read: rows of q's type and width, blocks of a multiple of 16 rows up to 1024."""
    if cache is None:
        return True
    rows = cache.shape[1]
    return cache.dtype == q_THC.dtype and cache.shape[2] == CHANNELS and rows % 16 == 0 and rows <= 1024 and cache.is_contiguous()


def _common(q_THC: Tensor, window_cache: Tensor, cmp_cache: Tensor | None, cmp_index: Tensor | None, window: int) -> bool:
    kept = window <= window_cache.shape[0] * window_cache.shape[1] and (cmp_index is None or cmp_index.is_contiguous())
    fits = q_THC.shape[0] > 0 and q_THC.shape[2] == CHANNELS and q_THC.is_contiguous() and kept
    return fits and _paged(q_THC, window_cache) and _paged(q_THC, cmp_cache)


def _sharedkv_when(
    q_THC: Tensor, window_cache: Tensor, window_table: Tensor, sink_H: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, scale: float,
    window: int, cmp_cache: Tensor | None = None, cmp_table: Tensor | None = None, cmp_index: Tensor | None = None, ratio: int = 0,
) -> bool:  # fmt: skip
    chosen = cmp_index is None or cmp_index.shape[1] == 512
    kind = cmp_cache is None or ratio in (4, 128)
    return q_THC.shape[1] == 64 and chosen and kind and _common(q_THC, window_cache, cmp_cache, cmp_index, window)


@sparse_attention.implement(
    "ascend", name=SHAREDKV, dtypes=_HALVES, needs=(SHAREDKV, f"{SHAREDKV}_metadata"), when=_sharedkv_when
)  # fmt: skip
def _sharedkv(
    q_THC: Tensor, window_cache: Tensor, window_table: Tensor, sink_H: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, scale: float,
    window: int, cmp_cache: Tensor | None = None, cmp_table: Tensor | None = None, cmp_index: Tensor | None = None, ratio: int = 0,
) -> Tensor:  # fmt: skip
    lengths = Lengths(cu_seqlens, start_pos, q_THC.device)
    kind = _kind(window, ratio if cmp_cache is not None else 1, "PA_ND")
    kind["cmp_mask_mode"] = _CAUSAL
    used = {"cu_seqlens_q": lengths.cu_seqlens, "seqused_kv": lengths.ends}
    about = {
        "num_heads_q": q_THC.shape[1],
        "num_heads_kv": 1,
        "head_dim": CHANNELS,
        "batch_size": lengths.batch,
        "max_seqlen_q": lengths.longest,
        "max_seqlen_kv": max(lengths.ends_host),
        "ori_topk": 0,
        "cmp_topk": 0 if cmp_index is None else cmp_index.shape[1],
        "has_ori_kv": True,
        "has_cmp_kv": cmp_cache is not None,
        "device": str(q_THC.device),
        **kind,
    }
    metadata = _metadata(
        (SHAREDKV, *about.items()), (cu_seqlens, start_pos), lambda: torch.ops.custom.npu_sparse_attn_sharedkv_metadata(**used, **about)
    )
    out: Tensor = torch.ops.custom.npu_sparse_attn_sharedkv(
        q=q_THC,
        **_tensors(lengths, window_cache, window_table, cmp_cache, cmp_table, cmp_index),
        **used,
        sinks=sink_H,
        metadata=metadata,
        softmax_scale=scale,
        return_softmax_lse=False,
        **kind,
    )[0]
    return out


def _kind(window: int, ratio: int, layout_kv: str) -> dict[str, Any]:
    """Arguments that the metadata and the attention must be given alike."""
    return {
        "cmp_ratio": ratio,
        "ori_mask_mode": _BAND,
        "ori_win_left": window - 1,
        "ori_win_right": 0,
        "layout_q": "TND",
        "layout_kv": layout_kv,
    }


def _tensors(
    lengths: Lengths, window_cache: Tensor, window_table: Tensor, cmp_cache: Tensor | None, cmp_table: Tensor | None, cmp_index: Tensor | None
) -> dict[str, Tensor | None]:  # fmt: skip
    return {
        "ori_kv": window_cache[:, :, None],
        "cmp_kv": None if cmp_cache is None else cmp_cache[:, :, None],
        "cmp_sparse_indices": None if cmp_index is None else cmp_index[:, None],
        "ori_block_table": lengths.there("window", window_table),
        "cmp_block_table": None if cmp_table is None else lengths.there("cmp", cmp_table),
    }


def _flash_mla_when(
    q_THC: Tensor, window_cache: Tensor, window_table: Tensor, sink_H: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, scale: float,
    window: int, cmp_cache: Tensor | None = None, cmp_table: Tensor | None = None, cmp_index: Tensor | None = None, ratio: int = 0,
) -> bool:  # fmt: skip
    heads = q_THC.shape[1]
    chosen = cmp_index is None or cmp_index.shape[1] in (512, 1024)
    # one head is outside the documented range of the 950, and no configuration has it
    powers = 2 <= heads <= 128 and heads & (heads - 1) == 0
    kind = cmp_cache is None or ratio in (4, 128)
    return powers and chosen and kind and _common(q_THC, window_cache, cmp_cache, cmp_index, window)


@sparse_attention.implement(
    "ascend", name=FLASH_MLA, dtypes=_HALVES, needs=(FLASH_MLA, f"{FLASH_MLA}_metadata"), when=_flash_mla_when
)  # fmt: skip
def _flash_mla(
    q_THC: Tensor, window_cache: Tensor, window_table: Tensor, sink_H: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, scale: float,
    window: int, cmp_cache: Tensor | None = None, cmp_table: Tensor | None = None, cmp_index: Tensor | None = None, ratio: int = 0,
) -> Tensor:  # fmt: skip
    lengths = Lengths(cu_seqlens, start_pos, q_THC.device)
    compressed = cmp_cache is not None
    kind = _kind(window, ratio if compressed else 1, "PA_BBND")
    kind["cmp_mask_mode"] = _CAUSAL if compressed else _NONE
    used = {"cu_seqlens_q": lengths.cu_seqlens, "seqused_ori_kv": lengths.ends}
    if compressed:
        used |= {"seqused_cmp_kv": lengths.compressed(ratio), "cmp_residual_kv": lengths.residual(ratio)}
    ends = lengths.ends_host
    about = {
        "num_heads_q": q_THC.shape[1],
        "num_heads_kv": 1,
        "head_dim": CHANNELS,
        "batch_size": lengths.batch,
        "max_seqlen_q": lengths.longest,
        "max_seqlen_ori_kv": max(ends),
        "max_seqlen_cmp_kv": max(ends) // ratio if compressed else 0,
        "ori_topk": 0,
        "cmp_topk": 0 if cmp_index is None else cmp_index.shape[1],
        "has_ori_kv": True,
        "has_cmp_kv": compressed,
        **kind,
    }
    metadata = _metadata(
        (FLASH_MLA, q_THC.device, *about.items()),
        (cu_seqlens, start_pos),
        lambda: torch.ops.cann_ops_transformer.sparse_flash_mla_metadata(**used, **about),
    )
    out: Tensor = torch.ops.cann_ops_transformer.sparse_flash_mla(
        q=q_THC,
        **_tensors(lengths, window_cache, window_table, cmp_cache, cmp_table, cmp_index),
        **used,
        sinks=sink_H,
        metadata=metadata,
        softmax_scale=scale,
        topk_value_mode=1,
        return_softmax_lse=False,
        **kind,
    )[0]
    return out
