"""Inputs of the real widths: what the vendor's ops accept, and the contracts' own samples are too small for.

Flash: D 4096, 64 heads of 512, 8 groups, 512 choices. Pro: D 7168, 128 heads of 512, 16 groups, 1024 choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ops import compress as compress_op
from ops import indexer, paged, quant
from ops.contract import CONTRACTS, Sample

Lengths = list[tuple[int, int]]

PROMPTS = (3, 4, 5, 127, 128, 129)
"""Prompt lengths around the ends of an entry of CSA and of HCA."""

RAGGED: Lengths = [(0, 3), (61, 1), (127, 2), (0, 0), (254, 3)]


def attention(
    dtype: torch.dtype, g: torch.Generator, lengths: Lengths, *, heads: int = 64, ratio: int = 0, topk: int = 0, window: int = 128,
    block_rows: int = 128, spare_blocks: int = 0,
) -> Sample:  # fmt: skip
    """One call of sparse_attention with rows of 512; `spare_blocks` moves the used blocks to the end of a larger window cache."""
    tokens = sum(n for _, n in lengths)
    q = torch.randn(tokens, heads, 512, generator=g).to(dtype)
    rows = [torch.randn(s + n, 512, generator=g).to(dtype) for s, n in lengths]
    cache, table = paged.paged(rows, block_rows, g)
    if spare_blocks:
        cache = torch.cat((cache[:1], torch.full((spare_blocks, *cache.shape[1:]), 999.0, dtype=dtype), cache[1:]))
        table = torch.where(table > 0, table + spare_blocks, table)
    cu = torch.tensor([0, *(n for _, n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start = torch.tensor([s for s, _ in lengths], dtype=torch.int32)
    kwargs: dict[str, Any] = {"scale": 512**-0.5, "window": window}
    if ratio:
        entries = [torch.randn((s + n) // ratio, 512, generator=g).to(dtype) for s, n in lengths]
        kwargs["cmp_cache"], kwargs["cmp_table"] = paged.paged(entries, 128 if ratio == 4 else 16, g)
        kwargs["ratio"] = ratio
    if topk:
        index = torch.full((tokens, topk), -1, dtype=torch.int32)
        for _, t, p in paged.tokens(cu, start):
            chosen = torch.randperm((p + 1) // ratio, generator=g)[:topk].int()
            index[t, : chosen.shape[0]] = chosen
        kwargs["cmp_index"] = index
    return Sample(f"{heads}-heads-{ratio}-{topk}-{lengths}", (q, cache, table, torch.randn(heads, generator=g), cu, start), kwargs)


def attention_samples(dtype: torch.dtype, heads: int, topk: int, seed: int = 0) -> Iterator[Sample]:
    """SWA, CSA and HCA: a step, a chunk that starts inside an entry, a ragged batch."""
    g = torch.Generator().manual_seed(seed)
    for lengths in ([(300, 1)], [(126, 5)], RAGGED, [(0, 2)]):
        yield attention(dtype, g, lengths, heads=heads)
        yield attention(dtype, g, lengths, heads=heads, ratio=4, topk=topk)
        yield attention(dtype, g, lengths, heads=heads, ratio=128)
    yield attention(dtype, g, [(4 * topk + 40, 2)], heads=heads, ratio=4, topk=topk)


def compress_samples(dtype: torch.dtype, hidden: int, seed: int = 0) -> Iterator[Sample]:
    """The three compressors of a hidden width: prompts around an entry's end, chunks, a ragged batch."""
    kinds = {"C4A": (512, 4, True, 16), "C4Li": (128, 4, True, 16), "C128A": (512, 128, False, 128)}
    cases: list[tuple[list[int], list[int]]] = [*(([n], [0]) for n in PROMPTS), ([2], [127]), ([1], [3]), ([5, 0, 1, 9], [0, 9, 127, 130])]
    for name, (c, ratio, overlap, per_block) in kinds.items():
        for j, (counts, starts) in enumerate(cases):
            args = compress_op._case(
                dtype, seed + j, counts, starts, ratio=ratio, c=c, overlap=overlap, hidden=hidden, rotary=64, per_block=per_block,
                norm_dtype=torch.float32,
            )  # fmt: skip
            yield Sample(f"{name}-{hidden}-{counts}-{starts}", args, {"ratio": ratio, "eps": 1e-6})


def index_samples(dtype: torch.dtype, topk: int, seed: int = 0) -> Iterator[Sample]:
    """Index choices with 64 heads of 128: fewer entries than choices, more, ragged, equal scores."""
    g = torch.Generator().manual_seed(seed)
    shape: dict[str, Any] = {"heads": 64, "d": 128, "topk": topk, "block_rows": 128}
    for lengths in ([(60, 2)], [(4 * topk + 30, 3)], RAGGED):
        yield Sample(f"{topk}-{lengths}", *indexer._sample(dtype, g, lengths, **shape))
    yield Sample(f"{topk}-ties", *indexer._sample(dtype, g, [(4 * topk + 80, 2)], **shape, values="zero"))


def grouped_linear_sample(dtype: torch.dtype, groups: int, tokens: int = 3, seed: int = 0) -> Sample:
    """The output projection of 4096 inputs per group, its weight lying in memory as [G, K, N]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, groups, 4096, generator=g).to(dtype)
    weight = (torch.randn(groups, 4096, 64, generator=g) / 64).to(dtype)
    return Sample(f"wo_a-{groups}", (x, weight.transpose(1, 2)))


def plain(sample: Sample, name: str, value: Tensor) -> Sample:
    """The sample with one keyword replaced."""
    return replace(sample, kwargs={**sample.kwargs, name: value})


def wide(op: str, dtype: torch.dtype = torch.bfloat16) -> list[Sample]:
    """All samples of an op at the widths of Flash and Pro."""
    assert op in CONTRACTS
    if op == "sparse_attention":
        return [*attention_samples(dtype, 64, 512), *attention_samples(dtype, 128, 1024)]
    if op == "compress":
        return [*compress_samples(dtype, 4096), *compress_samples(dtype, 7168)]
    if op == "index_topk":
        return [*index_samples(dtype, 512), *index_samples(dtype, 1024)]
    if op == "grouped_linear":
        return [grouped_linear_sample(dtype, 8), grouped_linear_sample(dtype, 16)]
    samples = [s for s in CONTRACTS[op].samples(dtype, 0) if {"flash", "pro"} & set(s.tags)]
    return [*samples, pro_queries(op, dtype)] if op in ("linear_int8", "linear_fp8") else samples


def pro_queries(op: str, dtype: torch.dtype) -> Sample:
    """Pro's query projection has 65536 outputs, one more than a quantised product may have (of few inputs here)."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(2, 128, generator=g).to(dtype)
    if op == "linear_int8":
        codes, x_scale = quant.quant_int8.reference(x)
        weight = quant.quant_int8.reference(torch.randn(65536, 128, generator=g))
    else:
        codes, x_scale = quant.quant_fp8.reference(x)
        weight = quant.block_weight(65536, 128, g)
    return Sample("pro-queries", (codes, *weight), {"x_scale": x_scale, "out_dtype": dtype}, ("pro",))
