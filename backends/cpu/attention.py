"""Core attention in blocks of queries: two matrix products per block around one softmax, nothing of size T x T.

Neighbouring queries share their window rows and, when few entries exist, all entries (unchosen ones are masked); with many
entries the chosen rows are gathered per query. Shapes as in ops/attention.py; G queries per block, M = G*H, N rows of a block.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.cpu.paging import Decoder, Ints, Rows
from ops.attention import sparse_attention
from ops.cache import unpack_fp8_rows
from ops.paged import packed_rope_dim

_PRODUCT_ROWS = 512  # rows M of a product: enough for full speed, more would only widen the band of masked window rows
_LANES = 16  # products are a fifth slower when the number of window rows is no multiple of the vector width
_SCORES = 1 << 21  # scores of one block, in floats: they stay in the last-level cache
_COPIED = 1 << 20  # floats of chosen entries copied at a time
_NEG = float("-inf")


def gathers(entries: int, queries: int, chosen: int, window: int, heads: int) -> bool:
    """Whether copying the chosen rows of each query beats masked products with all entries.

    Measured on AVX-512: products with copied rows run at 0.8 of the speed, a copy costs as much as the work of 8 heads on a row.
    Single queries gain nothing from sharing.
    """
    if queries == 1:
        return entries > chosen
    return entries + window > (1.25 + 8 / heads) * (chosen + window)


def _block_queries(heads: int, window: int) -> int:
    """Queries per block, so that the window rows of a block, window - 1 + queries, fill whole vectors."""
    queries = max(1, min(64, _PRODUCT_ROWS // heads))
    return queries + (1 - window - queries) % _LANES


def _decoder(cache: Tensor, channels: int) -> Decoder | None:
    if cache.dtype != torch.uint8:
        return None
    rope_dim = packed_rope_dim("sparse_attention", cache.shape[2], channels)
    return partial(unpack_fp8_rows, nope=channels - rope_dim, rope_dim=rope_dim, dtype=torch.float32)


def _chosen_mask(index_Gk: Ints, entries: int, device: torch.device) -> Tensor:
    """Additive mask [G, entries]: 0 where chosen; -1 falls into a spare column."""
    index = torch.from_numpy(index_Gk).to(device).long()
    mask = torch.full((index.shape[0], entries + 1), _NEG, device=device)
    return mask.scatter_(1, index.masked_fill_(index < 0, entries), 0.0)[:, :entries]


class _Sequence:
    """The queries of one sequence; q and out [n, H, C]."""

    def __init__(
        self,
        q: Tensor,
        out: Tensor,
        sink: Tensor,
        start: int,
        rows: Rows,
        entries: Rows | None,
        scale: float,
        window: int,
        ratio: int,
    ) -> None:
        self.q, self.out, self.sink = q, out, sink
        self.start, self.scale, self.window, self.ratio = start, scale, window, ratio
        n, self.heads, self.channels = q.shape
        self.first = max(start - window + 1, 0)
        self.rows = rows.span(self.first, start + n)
        self.entries = entries
        self.stored = (start + n) // ratio if entries is not None else 0
        self.shared: Tensor | None = None
        self.scratch = q.new_empty(0, dtype=torch.float32)
        self.band = ((0, 0), self.scratch)

    def run(self, index_nk: Ints | None) -> None:
        """Fill `out`, block after block; index None: every visible entry."""
        n = self.q.shape[0]
        width = _block_queries(self.heads, self.window)
        low = 0
        while low < n:
            # fewer queries per block where rows are many
            rows = (self.start + low + width) // self.ratio if self.entries is not None and index_nk is None else 0
            high = min(n, low + max(1, min(width, _SCORES // (self.heads * (rows + self.window + width)))))
            seen = (self.start + high) // self.ratio if self.entries is not None else 0
            if index_nk is None or not seen:
                self._dense(low, high, seen, None)
            elif gathers(seen, n, index_nk.shape[1], self.window, self.heads):
                self._gathered(low, high, index_nk[low:high])
            else:
                self._dense(low, high, seen, index_nk[low:high])
            low = high

    def _all_entries(self, seen: int) -> Tensor:
        assert self.entries is not None
        if self.shared is None:
            self.shared = self.entries.span(0, self.stored)
        return self.shared[:seen]

    def _scores(self, queries: int, columns: int) -> Tensor:
        """Uninitialised [M, columns]; memory is reused from block to block."""
        size = queries * self.heads * columns
        if self.scratch.numel() < size:
            self.scratch = self.q.new_empty(size, dtype=torch.float32)
        return self.scratch[:size].view(queries * self.heads, columns)

    def _window_rows(self, low: int, high: int) -> tuple[Tensor, int]:
        """Rows that the queries low..high-1 see, and how many of them precede the first query."""
        position = self.start + low
        first = max(position - self.window + 1, 0)
        return self.rows[first - self.first : position + high - low - self.first], position - first

    def _band(self, queries: int, before: int) -> Tensor:
        """Additive mask [G, 1, before + G] of window rows: query i sees the columns i + before - window + 1 .. i + before."""
        if self.band[0] != (queries, before):
            numbers = torch.arange(before + queries, device=self.q.device)
            age = numbers[:queries, None] + before - numbers
            mask = torch.zeros(age.shape, device=age.device).masked_fill_((age < 0) | (age >= self.window), _NEG)
            self.band = (queries, before), mask[:, None]
        return self.band[1]

    def _finish(self, low: int, high: int, o_MC: Tensor) -> None:
        if o_MC.dtype != self.out.dtype:
            self.out[low:high] = o_MC.view(high - low, self.heads, self.channels)

    def _block(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """q [M, C] in fp32 and the fp32 tensor [M, C] that takes the result (out itself where it is fp32)."""
        q_MC = self.q[low:high].reshape(-1, self.channels).float()
        if self.out.dtype == torch.float32:
            return q_MC, self.out[low:high].view(-1, self.channels)
        return q_MC, torch.empty_like(q_MC)

    def _dense(self, low: int, high: int, seen: int, index_Gk: Ints | None) -> None:
        """Products with all `seen` entries and the block's window rows; masks hide what single queries do not see."""
        near, before = self._window_rows(low, high)
        parts = [(near, seen, seen + near.shape[0])]
        if seen:
            parts.insert(0, (self._all_entries(seen), 0, seen))
        if index_Gk is not None:
            visible = np.arange(self.start + low + 1, self.start + high + 1) // self.ratio
            if ((index_Gk >= 0).sum(1) == visible).all():  # nothing was left out
                index_Gk = None
        self._attend(low, high, parts, seen, before, index_Gk)

    def _attend(
        self, low: int, high: int, parts: list[tuple[Tensor, int, int]], seen: int, before: int, index_Gk: Ints | None
    ) -> None:
        q_MC, o_MC = self._block(low, high)
        columns = parts[-1][2]
        s_MN = self._scores(high - low, columns + 1)
        for rows, left, right in parts:
            target = s_MN[:, left:right]
            torch.addmm(target, q_MC, rows.T, beta=0, alpha=self.scale, out=target)
        s_GHN = s_MN.view(high - low, self.heads, columns + 1)
        if index_Gk is not None:
            s_GHN[..., :seen].add_(_chosen_mask(index_Gk, seen, s_GHN.device)[:, None])
        if high - low > 1:
            s_GHN[..., seen:columns].add_(self._band(high - low, before))
            if seen and index_Gk is None:
                self._hide_late_entries(s_GHN, low, seen)
        s_GHN[..., columns] = self.sink
        torch.softmax(s_MN, 1, out=s_MN)
        for i, (rows, left, right) in enumerate(parts):
            torch.addmm(o_MC, s_MN[:, left:right], rows, beta=int(i > 0), out=o_MC)
        self._finish(low, high, o_MC)

    def _hide_late_entries(self, s_GHN: Tensor, low: int, seen: int) -> None:
        position = self.start + low
        common = (position + 1) // self.ratio
        if common < seen:
            last = torch.arange(position + 1, position + 1 + s_GHN.shape[0], device=s_GHN.device)
            late = torch.arange(common, seen, device=s_GHN.device) >= last.div_(self.ratio, rounding_mode="floor")[:, None]
            s_GHN[..., common:seen].masked_fill_(late[:, None], _NEG)

    def _gathered(self, low: int, high: int, index_Gk: Ints) -> None:
        """Products of each query with its own copies of the chosen entries; the window rows stay shared."""
        assert self.entries is not None
        near, before = self._window_rows(low, high)
        absent = index_Gk < 0
        if high - low == 1:
            chosen = index_Gk[~absent] if absent.any() else index_Gk[0]
            parts = [(self.entries.pick(chosen), 0, len(chosen)), (near, len(chosen), len(chosen) + near.shape[0])]
            self._attend(low, high, parts if len(chosen) else parts[1:], len(chosen), before, None)
            return
        step = max(1, min(high - low, _COPIED // (index_Gk.shape[1] * self.channels)))
        for at in range(low, high, step):
            end = min(at + step, high)
            self._gathered_block(at, end, index_Gk[at - low : end - low], absent[at - low : end - low])

    def _gathered_block(self, low: int, high: int, index_Gk: Ints, absent: NDArray[np.bool_]) -> None:
        assert self.entries is not None
        near, before = self._window_rows(low, high)
        queries, k = index_Gk.shape
        # an absent choice reads entry 0, which is stored, and is masked
        rows_GkC = self.entries.pick(np.maximum(index_Gk, 0).ravel()).view(queries, k, self.channels)
        q_MC, o_MC = self._block(low, high)
        columns = k + near.shape[0]
        s_MN = self._scores(queries, columns + 1)
        s_GHN = s_MN.view(queries, self.heads, columns + 1)
        # batched products are only fast on contiguous operands
        chosen_GHk = torch.bmm(q_MC.view(queries, self.heads, -1), rows_GkC.transpose(1, 2))
        torch.mul(chosen_GHk, self.scale, out=s_GHN[..., :k])
        if absent.any():
            s_GHN[..., :k].masked_fill_(torch.from_numpy(absent).to(s_GHN.device)[:, None], _NEG)
        target = s_MN[:, k:columns]
        torch.addmm(target, q_MC, near.T, beta=0, alpha=self.scale, out=target)
        s_GHN[..., k:columns].add_(self._band(queries, before))
        s_GHN[..., columns] = self.sink
        torch.softmax(s_MN, 1, out=s_MN)
        chosen_GHk.copy_(s_GHN[..., :k])
        torch.bmm(chosen_GHk, rows_GkC, out=o_MC.view(queries, self.heads, -1))
        o_MC.addmm_(s_MN[:, k:columns], near)
        self._finish(low, high, o_MC)


@sparse_attention.implement("cpu")
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
    channels = q_THC.shape[2]
    out = q_THC.new_empty(q_THC.shape)
    cu, tables = cu_seqlens.tolist(), window_table.cpu().numpy()
    decode = _decoder(window_cache, channels)
    entries, index, cmp_tables, cmp_decode = None, None, None, None
    if cmp_cache is not None and cmp_table is not None:
        cmp_tables, cmp_decode = cmp_table.cpu().numpy(), _decoder(cmp_cache, channels)
    for b, start in enumerate(start_pos.tolist()):
        low, high = cu[b], cu[b + 1]
        if low == high:
            continue
        if cmp_cache is not None and cmp_tables is not None:
            entries = Rows(cmp_cache, cmp_tables[b], cmp_decode)
            index = None if cmp_index is None else cmp_index[low:high].cpu().numpy()
        rows = Rows(window_cache, tables[b], decode)
        _Sequence(q_THC[low:high], out[low:high], sink_H, start, rows, entries, scale, window, ratio).run(index)
    return out
