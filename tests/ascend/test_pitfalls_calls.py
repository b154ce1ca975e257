"""Faults at the calls of vendor ops, second part: clamps of every expert, index choice, lengths and ratios, near ties, padding, high places.

Source: Ascend operator notes, section 10, and specification section 13; tests/pitfalls.yaml says which test stands for which report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.ascend import int8, moe, mx
from ops import indexer
from ops.contract import Sample
from ops.experts_int8 import pack_int8
from ops.experts_quant import pack_fp4
from ops.experts_samples import sample_dense, sample_rows
from ops.quant import quant_int8
from tests.ascend import wide
from tests.ascend.faults import BF16, NEWER, OLDER, REFUSED, Fault, call, check, index_call, index_result, of, piece

MLA, SHAREDKV = "cann_ops_transformer::sparse_flash_mla", "custom::npu_sparse_attn_sharedkv"
COMPRESSOR, GATING, SCATTER = "custom::compressor", "npu::npu_moe_gating_top_k", "npu::npu_scatter_nd_update_"
DEQUANT, TRANSPOSED = "custom::npu_dequant_swiglu_clamp_quant", "npu::npu_transpose_batchmatmul"
SINKHORN, SINKHORN_950 = "custom::npu_hc_pre_sinkhorn", "npu::npu_mhc_sinkhorn"
LONG = 310_000
"""Tokens of a context beyond the 300K from which a workspace was reported to be too small."""


def to(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, **{k: v for k, v in values.items() if k in kwargs}}


def through(name: str, f: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, name: f(kwargs[name])} if isinstance(kwargs.get(name), Tensor) else kwargs


def attention(lengths: wide.Lengths, **options: Any) -> Callable[[], Sample]:
    return lambda: wide.attention(BF16, torch.Generator().manual_seed(1), lengths, **options)


def index(number: int, topk: int = 512) -> Callable[[], Sample]:
    """0: fewer entries than choices; 1: a chunk that has to choose; 2: a ragged batch."""
    return lambda: list(wide.index_samples(BF16, topk))[number]


def compress(number: int, hidden: int = 4096) -> Callable[[], Sample]:
    return lambda: next(itertools.islice(wide.compress_samples(BF16, hidden), number, None))


def unclamped(activate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda gate_up, limit: activate(gate_up, 1e30)


def clamped_after_rounding(fused: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scale of a row comes from its values before the clamp."""

    def run(*rows_and_weights: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        codes, scale = fused(*rows_and_weights, limit)
        loose = fused(*rows_and_weights, 1e30)[1]
        return (codes.float() * (scale / loose)[:, None]).round().to(torch.int8), loose

    return lambda *call: run(*call[:-1], limit=call[-1])


def as_int8(x: Tensor) -> Tensor:
    """Rows as an INT8 cache would keep them."""
    codes, scale = quant_int8.reference(x.flatten(0, -2).float())
    return (codes.float() * scale[:, None]).view(x.shape).to(x.dtype)


def uncompressed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Lengths of keys in tokens where the op counts entries."""
    return {**kwargs, "seqused_k": kwargs["seqused_k"] * kwargs["cmp_ratio"] + kwargs["cmp_residual_k"]}


def first_300k(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "seqused_k": kwargs["seqused_k"].clamp(max=300_000 // 4), "cmp_residual_k": torch.zeros_like(kwargs["cmp_residual_k"])}


def many_keys() -> Sample:
    """Two thousand entries, of which 512 are chosen: around the last choice scores differ by a thousandth of their spread."""
    return Sample("many-keys", *index_of([(8000, 8)]))


def near_experts() -> Sample:
    """Experts that are one expert and small changes of it: their logits lie closer than bf16 can tell apart."""
    g = torch.Generator().manual_seed(4)
    x, one = torch.randn(33, 256, generator=g), torch.randn(256, generator=g)
    weight = (one + 2.0**-5 * torch.randn(64, 256, generator=g)) / 16
    return Sample("near-experts", (x.to(BF16), weight.to(BF16), torch.zeros(64)), {"topk": 6, "scale": 1.5}, ("near",))


def index_of(lengths: wide.Lengths) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return indexer._sample(BF16, torch.Generator().manual_seed(0), lengths, heads=64, d=128, topk=512, block_rows=128)


def long_index() -> Sample:
    return Sample("long", *index_of([(LONG - 1, 1)]))


def ragged_padded(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sequences of 5, 0, 1 and 9 tokens as if padded: two tokens of the last one count as tokens of the first."""
    cu = torch.tensor([0, 7, 7, 8, 15], dtype=torch.int32)
    return {**kwargs, "cu_seqlens": cu.to(kwargs["cu_seqlens"].device), "seqused": cu.diff().to(kwargs["cu_seqlens"].device)}


def large_hash_table() -> Sample:
    sample = of("gate_hash", "large-table")()
    x, weight, table, ids = sample.args
    return Sample("large-table", (x, weight, table.int(), ids), sample.kwargs)


def bias_among_the_logits(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "x": kwargs["x"] + kwargs["bias"], "bias": torch.zeros_like(kwargs["bias"])}


CHUNK: wide.Lengths = [(4 * 1024 + 40, 2)]
FAULTS = [
    # clamps: every place where an expert's activation is computed, with the limit lost or that of another model
    Fault("routed_unclamped_950", "moe_mlp", piece(moe, "clamped_halves", unclamped), of("moe_mlp", "many"), socs=NEWER),
    Fault("shared_unclamped_950", "clamped_swiglu", piece(moe, "clamped_halves", unclamped), of("clamped_swiglu", "flash"), socs=NEWER),
    Fault("fp4_experts_unclamped_950", "grouped_experts_fp4", piece(mx, "clamped_halves", unclamped), lambda: clamped_experts(pack_fp4),
          socs=NEWER),
    Fault("int8_experts_unclamped", "grouped_experts_int8", call(DEQUANT, to(clamp_limit=1e30)), lambda: clamped_experts(pack_int8),
          socs=OLDER),
    Fault("int8_experts_unclamped_950", "grouped_experts_int8", piece(int8, "clamped_halves", unclamped), lambda: clamped_experts(pack_int8),
          socs=NEWER),
    Fault("int8_experts_clamped_at_7", "grouped_experts_int8", call(DEQUANT, to(clamp_limit=7.0)), lambda: clamped_experts(pack_int8),
          socs=OLDER),
    Fault("fused_clamp_behind_the_rounding", "grouped_experts_int8", piece(int8, "fused_activation", clamped_after_rounding),
          lambda: clamped_experts(pack_int8), socs=OLDER),
    # index choice
    Fault("index_sees_the_future", "index_topk", index_call(to(mask_mode=0)), index(1)),
    Fault("index_lengths_in_tokens", "index_topk", index_call(uncompressed), index(1), REFUSED),
    Fault("index_residual_lost", "index_topk", index_call(through("cmp_residual_k", torch.zeros_like)), index(1)),
    Fault("index_keys_in_int8", "index_topk", index_call(through("k", as_int8)), index(1)),
    Fault("index_near_ties_by_bf16_weights", "index_topk", index_call(through("w", lambda w: w.bfloat16().float())), many_keys),
    Fault("index_keys_beyond_300k_lost", "index_topk", index_call(first_300k), long_index),
    Fault("index_choices_of_pro_cut_to_512", "index_topk", index_result(lambda i: torch.where(torch.arange(1024, device=i.device) < 512, i, -1).int()),
          index(1, 1024)),
    Fault("index_sentinels_lost", "index_topk", index_result(lambda i: i.clamp(min=0)), index(0)),
    # attention: lengths, choices, scale
    Fault("mla_choices_of_pro_cut_to_512", "sparse_attention",
          call(MLA, through("cmp_sparse_indices", lambda i: torch.where(torch.arange(1024, device=i.device) < 512, i, -1).int())),
          attention(CHUNK, heads=128, ratio=4, topk=1024)),
    Fault("mla_entries_in_tokens", "sparse_attention", call(MLA, through("seqused_cmp_kv", lambda t: t * 4), metadata=True),
          attention(CHUNK, heads=128, ratio=4, topk=1024), REFUSED),
    Fault("mla_tokens_in_entries", "sparse_attention", call(MLA, through("seqused_ori_kv", lambda t: t // 4), metadata=True),
          attention(CHUNK, heads=128, ratio=4, topk=1024), REFUSED),
    Fault("mla_residual_lost", "sparse_attention", call(MLA, through("cmp_residual_kv", torch.zeros_like), metadata=True),
          attention([(250, 10)], heads=128, ratio=128), REFUSED),
    Fault("amplitude_in_the_softmax_scale", "sparse_attention", call(SHAREDKV, to(softmax_scale=512**-0.5 * 1.2773**2)),
          attention([(2600, 2)], ratio=4, topk=512)),
    Fault("amplitude_in_the_softmax_scale_of_pro", "sparse_attention", call(MLA, to(softmax_scale=512**-0.5 * 1.2773**2)),
          attention([(250, 10)], heads=128, ratio=128)),
    Fault("sentinels_read_as_entry_0", "sparse_attention", call(SHAREDKV, through("cmp_sparse_indices", lambda i: i.clamp(min=0))),
          attention([(300, 2)], ratio=4, topk=512)),
    # compressor: places and padding
    Fault("start_pos_in_entries", "compress", call(COMPRESSOR, through("start_pos", lambda t: t // 4)), compress(7)),
    Fault("start_pos_of_the_call", "compress", call(COMPRESSOR, through("start_pos", torch.zeros_like)), compress(7, 7168)),
    Fault("padding_pooled", "compress", call(COMPRESSOR, ragged_padded), compress(8)),
    # output projection
    Fault("wo_a_in_fp8", "grouped_linear", call(TRANSPOSED, through("input", lambda x: x.to(torch.float8_e4m3fn).to(x.dtype))),
          lambda: wide.grouped_linear_sample(BF16, 8)),
    # gates
    Fault("gate_near_ties_by_bf16_logits", "gate_topk", call(GATING, through("x", lambda x: x.bfloat16().float())), near_experts),
    Fault("gate_bias_in_the_weights", "gate_topk", call(GATING, bias_among_the_logits), of("gate_topk", "many")),
    Fault("gate_normalised_again", "gate_topk", call(GATING, to(renorm=1)), of("gate_topk", "many"), REFUSED),
    Fault("hash_table_through_bf16", "gate_hash", call(GATING, through("tid2eid", lambda t: t.bfloat16().int())), large_hash_table),
    # writes
    Fault("addresses_through_fp32_in_the_wheels_scatter", "cache_insert", call(SCATTER, through("indices", lambda i: i.float().long())),
          lambda: high_rows(), socs=NEWER),
    Fault("padding_written_to_the_null_block", "cache_insert",
          call(SCATTER, through("indices", lambda i: torch.where(i == 0, torch.ones_like(i), i))),  # slot 0 is where it may go, slot 1 is not
          of("cache_insert", "odd-512"), socs=NEWER),
    # hyper-connections
    Fault("sinkhorn_of_20_rounds_behind_the_softmax", "hc_pre", call(SINKHORN, to(hc_sinkhorn_iters=21)), of("hc_pre", "flash-unit"), REFUSED,
          ("910_93",)),
    Fault("sinkhorn_of_20_rounds_behind_the_softmax_950", "hc_pre", call(SINKHORN_950, to(num_iters=21)), of("hc_pre", "steep"), socs=NEWER),
]  # fmt: skip


def clamped_experts(pack: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Sample:
    """Rows whose gate and up mostly leave 10, at widths that the vendor's ops take."""
    g = torch.Generator().manual_seed(2)
    rows = sample_rows(g, [3, 0, 2], 128, BF16)
    w13, w2 = sample_dense(g, 3, 128, 128, 40.0)
    return Sample("clamp-128", (*rows, *pack(w13), *pack(w2)), {"limit": 10.0})


def high_rows() -> Sample:
    """A cache of more than 2^24 rows, written at odd rows beyond that."""
    first = 2**24
    cache = torch.zeros(first // 128 + 2, 128, 1, dtype=BF16)
    return Sample("high", (cache, torch.arange(1, 5)[:, None].to(BF16), torch.tensor([first + 1, first + 3, first + 127, 5])))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_seen(fault: Fault, soc: str, device: torch.device) -> None:
    check(fault, soc, device)
