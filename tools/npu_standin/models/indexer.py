"""The lightning indexer. Shapes: T queries of B requests, N1 heads, 128 channels, k chosen entries per query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, require, require_dtype, require_shape
from tools.npu_standin.models.gating import top_lowest
from tools.npu_standin.models.metadata import compare, written
from tools.npu_standin.models.paging import check_cache, check_table, requests, rows_of

WIDTH, FAR = 128, 2**63 - 1
FULL, CAUSAL = 0, 3
OP = "npu_quant_lightning_indexer"


def choose(
    op: str, tokens: int, cu: Tensor, lengths: Tensor, ratio: int, mode: int, k: int, score: Callable[[int, int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices int32 [T, 1, k], best first, equal scores by lowest index, -1 behind the visible entries; and their scores.

    lengths count uncompressed tokens. sparse_mode 3: entries complete at the query's position; 0: all of the request.
    score(request, query row, n): scores of the first n entries.
    """
    chosen, values = torch.full((tokens, 1, k), -1, dtype=torch.int32), torch.zeros(tokens, 1, k)
    for b, t, position in requests(op, tokens, cu.tolist(), lengths.tolist()):
        visible = (int(lengths[b]) if mode == FULL else position + 1) // ratio
        found = score(b, t, visible)
        require(not bool(found.isnan().any()), op, "NaN scores", "numbers: top-k over NaN is undefined")
        order = top_lowest(found, k)
        chosen[t, 0, : order.numel()], values[t, 0, : order.numel()] = order.to(torch.int32), found[order]
    return chosen, values


def _check(
    op: str, query: Tensor, layouts: tuple[str, str], k: int, mode: int, ratio: int, far: tuple[int, int], heads: tuple[int, ...]
) -> None:
    require(
        layouts == ("TND", "PA_BSND"), op, f"layouts {layouts}", "('TND', 'PA_BSND') (BSND is documented too and not modelled)"
    )
    require_shape(op, "query", query, None, None, WIDTH)
    require(query.shape[1] in heads, op, f"{query.shape[1]} heads", f"{heads} heads: the indexer is not split over ranks")
    require(query.shape[0] > 0, op, "T = 0", "at least one token")
    require(1 <= k <= 2048, op, f"sparse_count {k}", "1..2048")
    require(mode in (FULL, CAUSAL), op, f"sparse_mode {mode}", "0 none or 3 causal")
    require(1 <= ratio <= 128 and ratio & (ratio - 1) == 0, op, f"cmp_ratio {ratio}", "a power of two up to 128")
    require(far == (FAR, FAR), op, f"pre_tokens, next_tokens {far}", "their defaults")


def _lengths(op: str, query_lengths: Tensor | None, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    cu, keys = needed(op, "actual_seq_lengths_query", query_lengths), needed(op, "actual_seq_lengths_key", key_lengths)
    require_dtype(op, "actual_seq_lengths_query", cu, torch.int32)
    require_dtype(op, "actual_seq_lengths_key", keys, torch.int32)
    require_shape(op, "actual_seq_lengths_key", keys, None)
    # the convention of torch_npu for TND: one cumulative length per request, no leading zero
    require_shape(op, "actual_seq_lengths_query", cu, keys.numel())
    return torch.cat((cu.new_zeros(1), cu)), keys


def _facts(
    heads: tuple[int, int, int], modes: tuple[int, int], cu: Tensor | None, keys: Tensor | None, layouts: tuple[str, str], k: int, mode: int,
    far: tuple[int, int], ratio: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "num_heads_q": heads[0], "num_heads_k": heads[1], "head_dim": heads[2], "quant modes": modes, "actual_seq_lengths_query": cu,
        "actual_seq_lengths_key": keys, "layout_query and layout_key": layouts, "sparse_count": k, "sparse_mode": mode,
        "pre_tokens and next_tokens": far, "cmp_ratio": ratio,
    }  # fmt: skip


@model("custom::npu_quant_lightning_indexer", socs=OLDER)
def npu_quant_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    query_dequant_scale: Tensor,
    key_dequant_scale: Tensor,
    query_quant_mode: int,
    key_quant_mode: int,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    metadata: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "PA_BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = FAR,
    next_tokens: int = FAR,
    cmp_ratio: int = 1,
    return_value: bool = False,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices int32 [T, 1, k] of sum over heads of w * relu(q . k) * scales, and an empty fp32 tensor.

    query int8 [T, 64, 128] with fp16 scales and fp16 weights [T, 64]; key int8 [blocks, bs, 1, 128] with fp16 scales [blocks, bs, 1].
    actual_seq_lengths_query [B]: cumulative, no leading zero; actual_seq_lengths_key [B]: uncompressed lengths, divided by cmp_ratio inside.
    """
    layouts, far = (layout_query, layout_key), (pre_tokens, next_tokens)
    _check(OP, query, layouts, sparse_count, sparse_mode, cmp_ratio, far, (64,))
    require_dtype(OP, "query", query, torch.int8)
    check_cache(OP, "key", key, WIDTH, torch.int8)
    require_dtype(OP, "key_dequant_scale", key_dequant_scale, torch.float16)
    require_shape(OP, "key_dequant_scale", key_dequant_scale, key.shape[0], key.shape[1], 1)
    for name, found in (("weights", weights), ("query_dequant_scale", query_dequant_scale)):
        require_dtype(OP, name, found, torch.float16)
        require_shape(OP, name, found, *query.shape[:2])
    require(query_quant_mode == 0 and key_quant_mode == 0, OP, f"quant modes {query_quant_mode}, {key_quant_mode}", "0, 0")
    require(not return_value, OP, "return_value True", "False on A2 and A3")
    cu, lengths = _lengths(OP, actual_seq_lengths_query, actual_seq_lengths_key)
    table = check_table(OP, "block_table", block_table, lengths.numel())
    heads, modes, given = (query.shape[1], 1, WIDTH), (query_quant_mode, key_quant_mode), actual_seq_lengths_query
    compare(OP, metadata, _facts(heads, modes, given, lengths, layouts, sparse_count, sparse_mode, far, cmp_ratio))
    factor = weights.float() * query_dequant_scale.float()
    require(
        float(factor.abs().amax()) <= 65504,
        OP,
        f"weights * scale up to {float(factor.abs().amax()):.3g}",
        "inside the range of fp16",
    )

    def score(b: int, t: int, n: int) -> Tensor:
        positions = torch.arange(n)
        keys, key_scale = rows_of(OP, key, table, b, positions), rows_of(OP, key_dequant_scale, table, b, positions)
        return (factor[t] @ (query[t].float() @ keys.float().T).relu()) * key_scale.float()

    return choose(OP, query.shape[0], cu, lengths, cmp_ratio, sparse_mode, sparse_count, score)[0], torch.empty(
        0, dtype=torch.float32
    )


@model("custom::npu_quant_lightning_indexer_metadata", socs=OLDER)
def npu_quant_lightning_indexer_metadata(
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    query_quant_mode: int,
    key_quant_mode: int,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    batch_size: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = FAR,
    next_tokens: int = FAR,
    cmp_ratio: int = 1,
    device: str = "npu:0",
) -> Tensor:
    """int32 [1024] whose arguments must equal those of the main call; the default of layout_key differs from the main op's."""
    heads, layouts, far = (num_heads_q, num_heads_k, head_dim), (layout_query, layout_key), (pre_tokens, next_tokens)
    modes = (query_quant_mode, key_quant_mode)
    return written(
        _facts(heads, modes, actual_seq_lengths_query, actual_seq_lengths_key, layouts, sparse_count, sparse_mode, far, cmp_ratio)
    )


@model("npu::npu_lightning_indexer")
def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = FAR,
    next_tokens: int = FAR,
    return_value: bool = False,
) -> tuple[Tensor, Tensor]:
    """The bf16 form of the wheel: (indices, values). There is no cmp_ratio, so mode 3 masks by the position of the key itself."""
    op = "npu_lightning_indexer"
    _check(op, query, (layout_query, layout_key), sparse_count, sparse_mode, 1, (pre_tokens, next_tokens), tuple(range(1, 65)))
    require_dtype(op, "query", query, torch.bfloat16, torch.float16)
    check_cache(op, "key", key, WIDTH, query.dtype)
    require_dtype(op, "weights", weights, query.dtype, torch.float32)
    require_shape(op, "weights", weights, *query.shape[:2])
    cu, lengths = _lengths(op, actual_seq_lengths_query, actual_seq_lengths_key)
    table = check_table(op, "block_table", block_table, lengths.numel())

    def score(b: int, t: int, n: int) -> Tensor:
        return weights[t].float() @ (query[t].float() @ rows_of(op, key, table, b, torch.arange(n)).float().T).relu()

    chosen, values = choose(op, query.shape[0], cu, lengths, 1, sparse_mode, sparse_count, score)
    return chosen, values.to(query.dtype) if return_value else torch.empty(0, dtype=query.dtype)
