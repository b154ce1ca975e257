"""Legal calls of the vendor ops that read paged caches: the compressor, the indexers, the attentions. Added to model_cases.CASES.

Three requests: 5 queries up to length 9, 1 query at length 256 (which completes entries of both kinds), 4 queries from the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ascend.model_cases import CASES, INT32, Arguments, angles, bf16, call, fp32, int8, ints, legal

COUNTS, ENDS, BLOCK = (5, 1, 4), (9, 256, 4), 16
TOKENS, BATCH = sum(COUNTS), len(COUNTS)
CUMULATIVE = (5, 6, 10)
COLUMNS = 20


def tables(g: torch.Generator) -> Tensor:
    """Block table int32 [B, 20] over blocks 1..60, block 0 unused."""
    return (torch.randperm(BATCH * COLUMNS, generator=g) + 1).view(BATCH, COLUMNS).to(INT32)


def cache(g: torch.Generator, width: int) -> Tensor:
    """bf16 cache [61, 16, 1, width]."""
    return bf16(g, BATCH * COLUMNS + 1, BLOCK, 1, width)


def positions() -> list[tuple[int, int, int]]:
    """(request, query row, position) of every query."""
    found, t = [], 0
    for b, (n, end) in enumerate(zip(COUNTS, ENDS, strict=True)):
        for i in range(n):
            found.append((b, t, end - n + i))
            t += 1
    return found


def lengths() -> dict[str, Tensor]:
    """cu_seqlens_q and the uncompressed lengths."""
    return {"cu": ints(0, *CUMULATIVE), "ends": ints(*ENDS)}


def row(cache_: Tensor, table: Tensor, b: int, position: int) -> Tensor:
    """One row of a paged cache."""
    return cache_[int(table[b, position // BLOCK]), position % BLOCK, 0]


def compressor(g: torch.Generator, coff: int = 2, ratio: int = 4, width: int = 512, hidden: int = 1024) -> Arguments:
    """A call of the compressor for these requests, earlier tokens being in the state."""
    rows = min(TOKENS, TOKENS // ratio + BATCH)
    cos, sin = angles(g, rows)
    return {
        "x": bf16(g, TOKENS, hidden), "wkv": bf16(g, coff * width, hidden) / 32, "wgate": bf16(g, coff * width, hidden) / 32,
        "state_cache": fp32(g, BATCH * COLUMNS + 1, BLOCK, 2 * coff * width), "ape": fp32(g, ratio, coff * width), "norm_weight": fp32(g, width),
        "rope_sin": sin, "rope_cos": cos, "rope_head_dim": 64, "cmp_ratio": ratio, "state_block_table": tables(g),
        "cu_seqlens": ints(0, *CUMULATIVE), "seqused": ints(*COUNTS), "start_pos": ints(*(e - n for e, n in zip(ENDS, COUNTS, strict=True))),
        "coff": coff, "norm_eps": 1e-6, "rotary_mode": 2, "cache_mode": 1,
    }  # fmt: skip


CASES["custom::compressor"] = compressor


def _metadata(name: str, given: Arguments, shared: tuple[str, ...], **own: Any) -> Tensor:
    CASES.setdefault(name, lambda g: {**own, **{key: given[key] for key in shared}})
    found: Tensor = call(name, **own, **{key: given[key] for key in shared})
    return found


ALIKE = (
    "cu_seqlens_q",
    "seqused_kv",
    "cmp_ratio",
    "ori_mask_mode",
    "cmp_mask_mode",
    "ori_win_left",
    "ori_win_right",
    "layout_q",
    "layout_kv",
)


def sharedkv(g: torch.Generator, *, cmp: bool = True, indices: bool = True, ratio: int = 4, heads: int = 64) -> Arguments:
    """A call of npu_sparse_attn_sharedkv; metadata to be made by `with_metadata`."""
    chosen = torch.full((TOKENS, 1, 512), -1, dtype=INT32)
    for _, t, p in positions():
        visible = (p + 1) // ratio
        chosen[t, 0, : min(visible, 7)] = torch.randperm(visible, generator=g)[:7].to(INT32)
    return {
        "q": bf16(g, TOKENS, heads, 512), "ori_kv": cache(g, 512), "cmp_kv": cache(g, 512) if cmp else None,
        "cmp_sparse_indices": chosen if cmp and indices else None, "ori_block_table": tables(g), "cmp_block_table": tables(g) if cmp else None,
        "cu_seqlens_q": ints(0, *CUMULATIVE), "seqused_kv": ints(*ENDS), "sinks": fp32(g, heads), "softmax_scale": 512**-0.5,
        "cmp_ratio": ratio if cmp else 1, "ori_mask_mode": 4, "cmp_mask_mode": 3, "ori_win_left": 127, "ori_win_right": 0, "layout_q": "TND",
        "layout_kv": "PA_ND", "return_softmax_lse": False,
    }  # fmt: skip


def with_metadata(given: Arguments, name: str = "custom::npu_sparse_attn_sharedkv", **own: Any) -> Arguments:
    """The call with metadata made for it."""
    chosen = given["cmp_sparse_indices"]
    about = {
        "num_heads_q": given["q"].shape[1], "num_heads_kv": 1, "head_dim": given["ori_kv"].shape[3], "batch_size": BATCH, "max_seqlen_q": max(COUNTS),
        "max_seqlen_kv": max(ENDS), "ori_topk": 0, "cmp_topk": 0 if chosen is None else chosen.shape[2], "has_ori_kv": True,
        "has_cmp_kv": given["cmp_kv"] is not None, "device": "cpu", **own,
    }  # fmt: skip
    return {**given, "metadata": _metadata(f"{name}_metadata", given, ALIKE, **about)}


CASES["custom::npu_sparse_attn_sharedkv"] = lambda g: with_metadata(sharedkv(g))


def packed_rows(g: torch.Generator) -> Tensor:
    """uint8 cache [61, 16, 1, 640] of rows as npu_kv_quant_sparse_attn_sharedkv documents them: e4m3, bf16 rope, bf16 scales."""
    count = (BATCH * COLUMNS + 1) * BLOCK
    rows = torch.full((count, 640), 0xCD, dtype=torch.uint8)
    rows[:, :448] = fp32(g, count, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    rows[:, 448:576] = bf16(g, count, 64).view(torch.uint8)
    rows[:, 576:590] = torch.exp2(torch.randint(-3, 3, (count, 7), generator=g).float()).bfloat16().view(torch.uint8)
    return rows.view(-1, BLOCK, 1, 640)


@legal("custom::npu_kv_quant_sparse_attn_sharedkv")
def _kv_quant(g: torch.Generator) -> Arguments:
    own = {"kv_quant_mode": 1, "tile_size": 64, "rope_head_dim": 64}
    given = {**sharedkv(g), "ori_kv": packed_rows(g), "cmp_kv": packed_rows(g), **own}
    return with_metadata(given, "custom::npu_kv_quant_sparse_attn_sharedkv", **own)


FLASH_ALIKE = ("cu_seqlens_q", "seqused_ori_kv", "seqused_cmp_kv", "cmp_residual_kv", *ALIKE[2:])


def flash_mla(g: torch.Generator, *, cmp: bool = True, indices: bool = True, ratio: int = 4, heads: int = 128) -> Arguments:
    """A call of sparse_flash_mla with its metadata."""
    given = sharedkv(g, cmp=cmp, indices=indices, ratio=ratio, heads=heads)
    ends = given.pop("seqused_kv")
    given |= {
        "seqused_ori_kv": ends, "seqused_cmp_kv": ends // ratio if cmp else None, "cmp_residual_kv": ends % ratio if cmp else None,
        "layout_kv": "PA_BBND", "topk_value_mode": 1, "cmp_mask_mode": 3 if cmp else 0,
    }  # fmt: skip
    chosen = given["cmp_sparse_indices"]
    about = {
        "num_heads_q": heads, "num_heads_kv": 1, "head_dim": 512, "batch_size": BATCH, "max_seqlen_q": max(COUNTS), "max_seqlen_ori_kv": max(ENDS),
        "max_seqlen_cmp_kv": max(ENDS) // ratio if cmp else 0, "ori_topk": 0, "cmp_topk": 0 if chosen is None else chosen.shape[2],
        "has_ori_kv": True, "has_cmp_kv": cmp,
    }  # fmt: skip
    return {**given, "metadata": _metadata("cann_ops_transformer::sparse_flash_mla_metadata", given, FLASH_ALIKE, **about)}


CASES["cann_ops_transformer::sparse_flash_mla"] = flash_mla

INDEXER_ALIKE = (
    "actual_seq_lengths_query", "actual_seq_lengths_key", "layout_query", "layout_key", "sparse_count", "sparse_mode", "cmp_ratio",
    "query_quant_mode", "key_quant_mode",
)  # fmt: skip


@legal("custom::npu_quant_lightning_indexer")
def _indexer(g: torch.Generator) -> Arguments:
    given = {
        "query": int8(g, TOKENS, 64, 128), "key": int8(g, BATCH * COLUMNS + 1, BLOCK, 1, 128), "weights": fp32(g, TOKENS, 64).half(),
        "query_dequant_scale": fp32(g, TOKENS, 64).abs().half() / 100, "key_dequant_scale": fp32(g, BATCH * COLUMNS + 1, BLOCK, 1).abs().half() / 100,
        "query_quant_mode": 0, "key_quant_mode": 0, "actual_seq_lengths_query": ints(*CUMULATIVE), "actual_seq_lengths_key": ints(*ENDS),
        "block_table": tables(g), "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 512, "sparse_mode": 3, "cmp_ratio": 4,
    }  # fmt: skip
    about = {
        "num_heads_q": 64, "num_heads_k": 1, "head_dim": 128, "batch_size": BATCH, "max_seqlen_q": max(COUNTS), "max_seqlen_k": max(ENDS), "device": "cpu",
    }  # fmt: skip
    return {**given, "metadata": _metadata("custom::npu_quant_lightning_indexer_metadata", given, INDEXER_ALIKE, **about)}


@legal("npu::npu_lightning_indexer")
def _wheel_indexer(g: torch.Generator) -> Arguments:
    return {
        "query": bf16(g, TOKENS, 64, 128), "key": cache(g, 128), "weights": bf16(g, TOKENS, 64), "actual_seq_lengths_query": ints(*CUMULATIVE),
        "actual_seq_lengths_key": ints(*ENDS), "block_table": tables(g), "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 512,
        "sparse_mode": 3, "return_value": True,
    }  # fmt: skip


CANN_ALIKE = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "cmp_residual_k",
    "layout_q",
    "layout_k",
    "mask_mode",
    "cmp_ratio",
    "max_seqlen_q",
)


@legal("cann_ops_transformer.lightning_indexer")
def _cann_indexer(g: torch.Generator) -> Arguments:
    given = {
        "q": bf16(g, TOKENS, 64, 128), "k": cache(g, 128), "w": fp32(g, TOKENS, 64), "topk": 512, "cu_seqlens_q": ints(0, *CUMULATIVE),
        "cu_seqlens_k": None, "seqused_q": None, "seqused_k": ints(*ENDS) // 4, "cmp_residual_k": ints(*ENDS) % 4, "block_table": tables(g),
        "output_idx_offset": None, "max_seqlen_q": max(COUNTS), "layout_q": "TND", "layout_k": "PA_BBND", "mask_mode": 3, "cmp_ratio": 4,
        "return_value": 0,
    }  # fmt: skip
    about = {
        "num_heads_q": 64,
        "num_heads_k": 1,
        "head_dim": 128,
        "topk": 512,
        "batch_size": BATCH,
        "max_seqlen_k": max(ENDS) // 4,
    }
    return {**given, "metadata": _metadata("cann_ops_transformer.lightning_indexer_metadata", given, CANN_ALIKE, **about)}
