"""Functions of the package cann_ops_transformer that have no schema: plain Python, called as cann_ops_transformer.<name>.

Their lengths of keys are compressed ones, with the tokens left over beside: the opposite of the `custom` indexer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, needed, require, require_dtype, require_shape, soc
from tools.npu_standin.models.indexer import CAUSAL, FULL, WIDTH, choose
from tools.npu_standin.models.metadata import compare, written
from tools.npu_standin.models.paging import check_cache, check_table, rows_of

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Function name -> model."""


def _function(fn: Callable[..., Any]) -> Callable[..., Any]:
    FUNCTIONS[fn.__name__] = fn
    return fn


def _facts(
    heads: tuple[int, int, int], topk: int, tensors: tuple[Tensor | None, ...], layouts: tuple[str, str], mode: int, ratio: int
) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "cmp_residual_k")
    return {
        "num_heads_q, num_heads_k, head_dim": heads, "topk": topk, **dict(zip(names, tensors, strict=True)),
        "layout_q and layout_k": layouts, "mask_mode": mode, "cmp_ratio": ratio,
    }  # fmt: skip


@_function
def lightning_indexer_metadata(
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    topk: int,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    cmp_residual_k: Tensor | None,
    batch_size: int = 0,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
    layout_q: str,
    layout_k: str,
    mask_mode: int = 0,
    cmp_ratio: int = 1,
) -> Tensor:
    """int32 [1024] whose arguments must equal those of the indexer call."""
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k)
    return written(_facts((num_heads_q, num_heads_k, head_dim), topk, tensors, (layout_q, layout_k), mask_mode, cmp_ratio))


@_function
def lightning_indexer(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    topk: int,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    cmp_residual_k: Tensor | None,
    block_table: Tensor | None,
    output_idx_offset: int | Tensor | None,
    metadata: Tensor | None,
    max_seqlen_q: int = -1,
    layout_q: str = "BSND",
    layout_k: str = "BSND",
    mask_mode: int = 0,
    cmp_ratio: int = 1,
    return_value: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices int32 [T, 1, topk], best first, equal scores by lowest index, -1 for none; and an empty tensor.

    q bf16/fp16 [T, N, 128], k [blocks, bs, 1, 128] of its type, w fp32 [T, N]. seqused_k [B]: compressed lengths; cmp_residual_k [B]:
    original length mod cmp_ratio, needed with cmp_ratio > 1 and mask_mode 3. A2 and A3: 64 heads, topk up to 2048.
    """
    op, older = "cann_ops_transformer.lightning_indexer", soc() in OLDER
    require(
        (layout_q, layout_k) == ("TND", "PA_BBND"),
        op,
        f"layouts {(layout_q, layout_k)}",
        "('TND', 'PA_BBND') (others are not modelled)",
    )
    require_shape(op, "q", q, None, None, WIDTH)
    require_dtype(op, "q", q, torch.bfloat16, torch.float16)
    require(q.shape[0] > 0, op, "T = 0", "at least one token")
    heads = q.shape[1]
    require(heads == 64 if older else 1 <= heads <= 64, op, f"{heads} heads on {soc()}", "64 on A2 and A3, 1..64 on 950")
    check_cache(op, "k", k, WIDTH, q.dtype)
    require_dtype(op, "w", w, torch.float32)
    require_shape(op, "w", w, *q.shape[:2])
    require(1 <= topk <= (2048 if older else 8192), op, f"topk {topk} on {soc()}", "up to 2048 on A2 and A3, 8192 on 950")
    require(mask_mode in (FULL, CAUSAL), op, f"mask_mode {mask_mode}", "0 or 3")
    power = 1 <= cmp_ratio <= 128 and cmp_ratio & (cmp_ratio - 1) == 0
    require(power, op, f"cmp_ratio {cmp_ratio}", "a power of two up to 128")
    require(cu_seqlens_k is None and seqused_q is None and output_idx_offset is None and return_value == 0, op,
            "cu_seqlens_k, seqused_q, output_idx_offset or return_value", "none of them (not modelled)")  # fmt: skip
    cu, entries = needed(op, "cu_seqlens_q", cu_seqlens_q), needed(op, "seqused_k", seqused_k)
    table = check_table(op, "block_table", block_table, entries.numel())
    lengths = entries
    if cmp_ratio > 1 and mask_mode == CAUSAL:
        left = needed(op, "cmp_residual_k", cmp_residual_k)
        require_dtype(op, "cmp_residual_k", left, torch.int32)
        require(bool(((left >= 0) & (left < cmp_ratio)).all()), op, f"cmp_residual_k {left.tolist()}", f"0..{cmp_ratio - 1}")
        lengths = entries * cmp_ratio + left
    elif cmp_ratio > 1:
        lengths = entries * cmp_ratio
    for name, tensor in (("cu_seqlens_q", cu), ("seqused_k", entries)):
        require_dtype(op, name, tensor, torch.int32)
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cmp_residual_k)
    compare(op, metadata, _facts((heads, 1, WIDTH), topk, tensors, (layout_q, layout_k), mask_mode, cmp_ratio))

    def score(b: int, t: int, n: int) -> Tensor:
        return w[t] @ (q[t].float() @ rows_of(op, k, table, b, torch.arange(n)).float().T).relu()

    return choose(op, q.shape[0], cu, lengths, cmp_ratio, mask_mode, topk, score)[0], torch.empty(0, dtype=torch.float32)
