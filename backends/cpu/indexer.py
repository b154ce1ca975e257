"""Index choice in blocks: scores by one matrix product over heads and queries, relu, a weighted sum over heads, then top-k.

Queries that see no more than k entries need no scores. Shapes as in ops/indexer.py; G queries per block, n keys per chunk.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from backends.cpu.paging import Rows
from ops.cache import unpack_index_rows
from ops.indexer import index_topk

_BLOCK = 32  # queries of one score block
_FEW = 8  # below so many queries, keys are the tall operand of the product
_CHUNK = 1 << 19  # scores per head and query in one chunk, in floats: 2 MB stay near the cores
_SHARED_KEYS = 1 << 23  # floats of keys that are decoded once per call (32 MB) instead of once per block


def _few_scores(q_GHd: Tensor, w_GH: Tensor, keys: Rows, score_GN: Tensor) -> None:
    """Keys [n, d] times queries [d, G*H]: fastest for up to a few queries, where keys are read once from memory."""
    queries, heads, d = q_GHd.shape
    q_dM = q_GHd.reshape(-1, d).T
    chunk = max(256, _CHUNK // (queries * heads))
    entries = score_GN.shape[1]
    scratch = q_GHd.new_empty((min(chunk, entries), queries * heads))
    for low in range(0, entries, chunk):
        high = min(low + chunk, entries)
        dots_nM = torch.mm(keys.span(low, high), q_dM, out=scratch[: high - low]).relu_()
        for i in range(queries):
            torch.mv(dots_nM[:, i * heads : (i + 1) * heads], w_GH[i], out=score_GN[i, low:high])


def _block_scores(q_GHd: Tensor, w_GH: Tensor, keys: Rows | Tensor, score_GN: Tensor, scratch: Tensor) -> None:
    """Queries [G*H, d] times keys [d, n]."""
    queries, heads, d = q_GHd.shape
    q_Md = q_GHd.reshape(-1, d)
    entries = score_GN.shape[1]
    chunk = max(256, scratch.numel() // (queries * heads))
    for low in range(0, entries, chunk):
        high = min(low + chunk, entries)
        keys_nd = keys[low:high] if isinstance(keys, Tensor) else keys.span(low, high)
        dots_Mn = scratch[: queries * heads * (high - low)].view(-1, high - low)
        torch.mm(q_Md, keys_nd.T, out=dots_Mn).relu_()
        score_GN[:, low:high] = torch.bmm(w_GH[:, None], dots_Mn.view(queries, heads, -1))[:, 0]


def _best(score_GN: Tensor, topk: int) -> Tensor:
    """Indices [G, topk] of the largest scores, ascending; of equal ones the lowest."""
    values, index = torch.topk(score_GN, topk, sorted=False)
    kept = score_GN >= values.amin(1, keepdim=True)
    queries = score_GN.shape[0]
    if int(kept.sum()) == queries * topk:
        return kept.nonzero()[:, 1].view(queries, topk) if queries > 1 else index.sort().values
    index = index.sort().values
    for i in (kept.sum(1) > topk).nonzero()[:, 0].tolist():
        # entries as good as the last chosen one were left out: take the first of them
        last = values[i].min()
        above, equal = (score_GN[i] > last).nonzero()[:, 0], (score_GN[i] == last).nonzero()[:, 0]
        index[i] = torch.cat((above, equal[: topk - above.shape[0]])).sort().values
    return index


def _choose(q: Tensor, w: Tensor, keys: Rows, index: Tensor, start: int, ratio: int) -> None:
    """Fill index [n, k] for the queries q [n, H, d] of one sequence at positions start.. ."""
    n, heads, d = q.shape
    topk = index.shape[1]
    # queries before `first` see at most k entries and take them all
    first = min(n, max(0, (topk + 1) * ratio - 1 - start))
    if first:
        visible = torch.arange(start + 1, start + first + 1, device=q.device).div_(ratio, rounding_mode="floor")
        every = torch.arange(topk, device=q.device)
        index[:first] = torch.where(every < visible[:, None], every, -1)
    if first == n:
        return
    few = n - first < _FEW
    stored = (start + n) // ratio
    source: Rows | Tensor = keys
    if not few and stored * d <= _SHARED_KEYS:
        source = keys.span(0, stored)
    scratch = q.new_empty(0 if few else max(_CHUNK, 256 * _BLOCK * heads), dtype=torch.float32)
    for low in range(first, n, _BLOCK):
        high = min(low + _BLOCK, n)
        seen, common = (start + high) // ratio, (start + low + 1) // ratio
        score_GN = q.new_empty((high - low, seen), dtype=torch.float32)
        q_GHd = q[low:high].float()
        if few:
            _few_scores(q_GHd, w[low:high], keys, score_GN)
        else:
            _block_scores(q_GHd, w[low:high], source, score_GN, scratch)
        if common < seen:
            visible = torch.arange(start + low + 1, start + high + 1, device=q.device).div_(ratio, rounding_mode="floor")
            score_GN[:, common:].masked_fill_(torch.arange(common, seen, device=q.device) >= visible[:, None], float("-inf"))
        index[low:high] = _best(score_GN, topk)


@index_topk.implement("cpu")
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
    index = q_THd.new_empty((q_THd.shape[0], topk), dtype=torch.int32)
    decode = partial(unpack_index_rows, dtype=torch.float32, channels=q_THd.shape[2]) if key_cache.dtype == torch.uint8 else None
    cu, tables = cu_seqlens.tolist(), block_table.cpu().numpy()
    for b, start in enumerate(start_pos.tolist()):
        low, high = cu[b], cu[b + 1]
        if low < high:
            keys = Rows(key_cache, tables[b], decode)
            _choose(q_THd[low:high], w_TH[low:high], keys, index[low:high], start, ratio)
    return index
