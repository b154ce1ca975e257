"""Attention, index choice and compressor of few tokens over paged fp32 caches. Shapes as in ops/attention.py, ops/indexer.py
and ops/compress.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, native
from ops.attention import sparse_attention
from ops.compress import compress
from ops.indexer import index_topk

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32 caches"


def _inside(result: Tensor | None, op: str, tables: Tensor) -> Tensor:
    if result is None:
        raise IndexError(f"{op}: the call needs rows of blocks that its table {tuple(tables.shape)} or its cache does not have")
    return result


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
    return native().sparse_attention(
        True,
        q_THC,
        window_cache,
        window_table,
        sink_H,
        cu_seqlens,
        start_pos,
        cmp_cache,
        cmp_table,
        cmp_index,
        scale,
        window,
        ratio,
    )


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
    out = native().sparse_attention(
        False,
        q_THC,
        window_cache,
        window_table,
        sink_H,
        cu_seqlens,
        start_pos,
        cmp_cache,
        cmp_table,
        cmp_index,
        scale,
        window,
        ratio,
    )
    return _inside(out, "sparse_attention", window_table)


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
    return native().compress(
        True, x_TD, wkv, wgate, ape, norm_weight, cos_ER2, sin_ER2, state, state_table, cu_seqlens, start_pos, ratio, eps
    )


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
    out = native().compress(
        False, x_TD, wkv, wgate, ape, norm_weight, cos_ER2, sin_ER2, state, state_table, cu_seqlens, start_pos, ratio, eps
    )
    return _inside(out, "compress", state_table)


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
    return native().index_topk(True, q_THd, w_TH, key_cache, block_table, cu_seqlens, start_pos, ratio, topk)


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
    index = native().index_topk(False, q_THd, w_TH, key_cache, block_table, cu_seqlens, start_pos, ratio, topk)
    return _inside(index, "index_topk", block_table)
