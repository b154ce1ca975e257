"""Attention, index choice and compressor of few tokens over paged fp32 caches. Shapes as in ops/attention.py, ops/indexer.py
and ops/compress.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, kernel, threads
from ops.attention import sparse_attention
from ops.compress import compress
from ops.indexer import index_topk

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32 caches"


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _attention_fits(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
) -> bool:
    caches = (q_THC, window_cache) if cmp_cache is None else (q_THC, window_cache, cmp_cache)
    return 0 < q_THC.shape[0] <= FEW and all(t.dtype == torch.float32 and t.is_contiguous() for t in caches)


@sparse_attention.implement("cpu_native", dtypes=F32, needs=[NEED], when=_attention_fits, note=_NOTE)
def _sparse_attention(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
) -> Tensor:
    out, (_, heads, c) = torch.empty_like(q_THC), q_THC.shape
    table, sink = window_table.contiguous(), sink_H.float().contiguous()
    entry_table = None if cmp_table is None else cmp_table.contiguous()
    index = None if cmp_index is None else cmp_index.contiguous()
    block, width = (1, 1) if cmp_cache is None or cmp_table is None else (cmp_cache.shape[1], cmp_table.shape[1])
    kernel("v4_attention")(
        q_THC.data_ptr(), window_cache.data_ptr(), table.data_ptr(), sink.data_ptr(), cu_seqlens.data_ptr(), start_pos.data_ptr(),
        _address(cmp_cache), _address(entry_table), _address(index), out.data_ptr(),
        start_pos.shape[0], heads, c, window_cache.shape[1], table.shape[1], block, width,
        1 if index is None else index.shape[1], window, ratio, scale, threads(),
    )  # fmt: skip
    return out


def _compress_fits(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> bool:
    kept = (x_TD, wkv, wgate, ape, norm_weight, cos_ER2, sin_ER2, state)
    return 0 < x_TD.shape[0] <= FEW and all(t.dtype == torch.float32 and t.is_contiguous() for t in kept)


@compress.implement("cpu_native", dtypes=F32, needs=[NEED], when=_compress_fits, note=_NOTE)
def _compress(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> Tensor:
    (width, d), c, (entries, pairs) = wkv.shape, norm_weight.shape[0], cos_ER2.shape
    table, out = state_table.contiguous(), x_TD.new_empty(entries, c)
    kernel("v4_compress")(
        x_TD.data_ptr(), wkv.data_ptr(), wgate.data_ptr(), ape.data_ptr(), norm_weight.data_ptr(), cos_ER2.data_ptr(),
        sin_ER2.data_ptr(), state.data_ptr(), table.data_ptr(), cu_seqlens.data_ptr(), start_pos.data_ptr(), out.data_ptr(),
        start_pos.shape[0], d, width, c, state.shape[1], table.shape[1], entries, pairs, ratio, eps, threads(),
    )  # fmt: skip
    return out


def _index_fits(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
) -> bool:
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in (q_THd, w_TH, key_cache))
    return plain and 0 < q_THd.shape[0] <= FEW and q_THd.shape[1] % 16 == 0


@index_topk.implement("cpu_native", dtypes=F32, needs=[NEED], when=_index_fits, note=_NOTE)
def _index_topk(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
) -> Tensor:
    index, table, (_, heads, d) = torch.empty((q_THd.shape[0], topk), dtype=torch.int32), block_table.contiguous(), q_THd.shape
    cu, score, best, team = cu_seqlens.tolist(), kernel("v4_index_scores"), kernel("v4_best"), threads()
    for b, start in enumerate(start_pos.tolist()):
        for t in range(cu[b], cu[b + 1]):
            visible = (start + t - cu[b] + 1) // ratio
            if visible <= topk:
                every = torch.arange(topk, dtype=torch.int32)
                index[t] = every.masked_fill_(every >= visible, -1)
                continue
            scores = q_THd.new_empty(visible)
            score(
                q_THd[t].data_ptr(), w_TH[t].data_ptr(), key_cache.data_ptr(), table[b].data_ptr(), scores.data_ptr(),
                visible, heads, d, key_cache.shape[1], team,
            )  # fmt: skip
            best(scores.data_ptr(), index[t].data_ptr(), visible, topk)
    return index
