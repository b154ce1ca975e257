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


def _batch_fits(tokens: int, cu_seqlens: Tensor, start_pos: Tensor, *tables: Tensor | None) -> bool:
    plain = all(t is None or (t.dtype == torch.int32 and t.is_contiguous()) for t in (cu_seqlens, start_pos, *tables))
    return plain and 0 < tokens <= FEW and cu_seqlens.shape[0] == start_pos.shape[0] + 1


def _refuse(op: str, tables: Tensor) -> None:
    raise IndexError(f"{op}: the call needs rows of blocks that its table {tuple(tables.shape)} or its cache does not have")


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
    plain = all(t.dtype == torch.float32 and t.is_contiguous() and t.shape[2] == q_THC.shape[2] for t in caches)
    agree = sink_H.shape == q_THC.shape[1:2] and (cmp_index is None or cmp_index.shape[0] == q_THC.shape[0])
    return plain and agree and _batch_fits(q_THC.shape[0], cu_seqlens, start_pos, window_table, cmp_table, cmp_index)


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
    sink = sink_H.float().contiguous()
    blocks, block = (0, 1) if cmp_cache is None else cmp_cache.shape[:2]
    failed = kernel("v4_attention")(
        q_THC.data_ptr(), window_cache.data_ptr(), window_table.data_ptr(), sink.data_ptr(), cu_seqlens.data_ptr(),
        start_pos.data_ptr(), _address(cmp_cache), _address(cmp_table), _address(cmp_index), out.data_ptr(),
        start_pos.shape[0], heads, c, window_cache.shape[1], window_table.shape[1], window_cache.shape[0],
        block, 0 if cmp_table is None else cmp_table.shape[1], blocks,
        0 if cmp_index is None else cmp_index.shape[1], window, ratio, scale, threads(),
    )  # fmt: skip
    if failed:
        _refuse("sparse_attention", window_table)
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
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in kept)
    (w, d), c = wkv.shape, norm_weight.shape[0]
    agree = (
        wgate.shape == wkv.shape
        and x_TD.shape[1] == d
        and ape.shape == (ratio, w)
        and w in (c, 2 * c)
        and state.shape[2] == 2 * w
    )
    rotary = cos_ER2.shape == sin_ER2.shape and 2 * cos_ER2.shape[1] <= c
    return plain and agree and rotary and _batch_fits(x_TD.shape[0], cu_seqlens, start_pos, state_table)


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
    out = x_TD.new_empty(entries, c)
    failed = kernel("v4_compress")(
        x_TD.data_ptr(), wkv.data_ptr(), wgate.data_ptr(), ape.data_ptr(), norm_weight.data_ptr(), cos_ER2.data_ptr(),
        sin_ER2.data_ptr(), state.data_ptr(), state_table.data_ptr(), cu_seqlens.data_ptr(), start_pos.data_ptr(), out.data_ptr(),
        start_pos.shape[0], d, width, c, state.shape[1], state_table.shape[1], state.shape[0],
        entries, pairs, ratio, eps, threads(),
    )  # fmt: skip
    if failed:
        _refuse("compress", state_table)
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
    agree = w_TH.shape == q_THd.shape[:2] and key_cache.shape[2] == q_THd.shape[2] and q_THd.shape[1] % 16 == 0 and topk > 0
    return plain and agree and _batch_fits(q_THd.shape[0], cu_seqlens, start_pos, block_table)


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
    index, (_, heads, d) = torch.empty((q_THd.shape[0], topk), dtype=torch.int32), q_THd.shape
    cu, score, best, team = cu_seqlens.tolist(), kernel("v4_index_scores"), kernel("v4_best"), threads()
    for b, start in enumerate(start_pos.tolist()):
        for t in range(cu[b], cu[b + 1]):
            visible = (start + t - cu[b] + 1) // ratio
            if visible <= topk:
                every = torch.arange(topk, dtype=torch.int32)
                index[t] = every.masked_fill_(every >= visible, -1)
                continue
            scores = q_THd.new_empty(visible)
            failed = score(
                q_THd[t].data_ptr(), w_TH[t].data_ptr(), key_cache.data_ptr(), block_table[b].data_ptr(), scores.data_ptr(),
                visible, heads, d, key_cache.shape[1], block_table.shape[1], key_cache.shape[0], team,
            )  # fmt: skip
            if failed:
                _refuse("index_topk", block_table)
            best(scores.data_ptr(), index[t].data_ptr(), visible, topk)
    return index
