"""Index choice: scores of all visible entries, then the k largest of each token.

Shapes as in ops/indexer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.choice import ALIGN, MOST, choose
from backends.cuda_triton.launch import NEED, SOC, blocks, kernels, power
from ops.indexer import index_topk

BF16 = (torch.bfloat16,)
WIDEST = 256
_SCRATCH = 1 << 28
"""Scores held at a time; more tokens are taken in turns."""
_ENTRIES = 128
_TOGETHER = 16


def _fits(
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
    if q_THd.dim() != 3 or q_THd.dtype != torch.bfloat16 or not q_THd.is_contiguous() or not q_THd.numel() or q_THd.shape[2] > WIDEST:
        return False
    batch, d = start_pos.shape[0], q_THd.shape[2]
    lists = cu_seqlens.shape == (batch + 1,) and cu_seqlens.dtype == start_pos.dtype == block_table.dtype == torch.int32
    weights = w_TH.dtype == torch.float32 and w_TH.shape == q_THd.shape[:2] and w_TH.is_contiguous()
    if not (lists and weights and block_table.dim() == 2 and block_table.shape[0] == batch and key_cache.dim() == 3):
        return False
    if key_cache.stride(2) != 1 or (key_cache.shape[1] > 1 and key_cache.stride(1) != key_cache.shape[2]):
        return False
    plain = key_cache.dtype == torch.bfloat16 and key_cache.shape[2] == d
    # the scales behind a block's codes are read as fp32
    aligned = key_cache.stride(0) % 4 == 0 and key_cache.shape[1] * d % 4 == 0 and key_cache.data_ptr() % 4 == 0
    packed = key_cache.dtype == torch.uint8 and key_cache.shape[2] == d + 4 and aligned
    return (plain or packed) and ratio >= 1 and 1 <= topk <= MOST


@index_topk.implement(
    "cuda_triton", dtypes=BF16, soc=SOC, needs=[NEED], when=_fits, note=f"bf16 queries, bf16 or FP8 keys, up to {MOST} chosen"
)
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
    device, tokens = q_THd.device, q_THd.shape[0]
    table, cu, start = (t.to(device).contiguous() for t in (block_table, cu_seqlens, start_pos))
    columns = table.shape[1] * key_cache.shape[1]
    pitch = max(blocks(columns, ALIGN), 1) * ALIGN
    index = torch.empty(tokens, topk, dtype=torch.int32, device=device)
    step = max(min(_SCRATCH // pitch, tokens, 65535), 1)
    score = torch.empty(step, pitch, dtype=torch.float32, device=device)
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        _score(score, q_THd, w_TH, key_cache, table, cu, start, first, count, ratio)
        choose(index[first : first + count], score, cu, start, first, ratio, columns)
    return index


def _score(
    score: Tensor, q: Tensor, w: Tensor, keys: Tensor, table: Tensor, cu: Tensor, start: Tensor, first: int, count: int, ratio: int
) -> None:
    _, heads, d = q.shape
    batch, columns = start.shape[0], score.shape[1]
    # tokens of one sequence share its keys
    together = min(_TOGETHER, power(blocks(count, batch)))
    entries = 2 * _ENTRIES if together == 1 else _ENTRIES
    kernels("indexer").scores[(blocks(columns, entries), blocks(count, together))](
        q, w, keys, table, cu, start, score, first, first + count, batch, table.shape[1], keys.stride(0), columns, ratio, WIDTH=d, ROW=d,
        PER_BLOCK=keys.shape[1], PACKED=keys.dtype == torch.uint8, HEADS=heads, TOKENS=together, BATCH=power(batch), BLOCK_N=entries,
        BLOCK_H=min(power(heads, 16), 64), BLOCK_D=power(d, 16), num_warps=4, num_stages=2,
    )  # fmt: skip
