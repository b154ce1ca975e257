"""The compressor one token at a time, over a private state in which no token of the call is missing.

Shapes as in ops/compress.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.cpu_invariant.rows import fresh, register

_ONE = torch.tensor([0, 1], dtype=torch.int32)


class _PrivateState:
    """State rows of one sequence from two blocks of `ratio` tokens before the call to its end.

    The call's own table may leave tokens out that later tokens of the same call still pool; here all are stored.
    """

    def __init__(self, state: Tensor, table_row: Tensor, start: int, end: int, ratio: int) -> None:
        self.state, self.table_row = state, table_row
        per_block = state.shape[1]
        oldest = max(0, (start // ratio - 1) * ratio)
        low, high = oldest // per_block, -(-end // per_block)
        self.rows = state.new_zeros((high - low + 1, *state.shape[1:]))
        self.table = torch.zeros(1, high, dtype=torch.int32)
        self.table[0, low:] = torch.arange(1, high - low + 1, dtype=torch.int32)
        self._copy(oldest, start, back=False)

    def _copy(self, first: int, end: int, *, back: bool) -> None:
        position = torch.arange(first, end)
        block, row = position // self.state.shape[1], position % self.state.shape[1]
        place = self.table_row[block].long()
        kept = place > 0
        place, mine, row = place[kept], self.table[0, block[kept]].long(), row[kept]
        if back:
            self.state[place, row] = self.rows[mine, row]
        else:
            self.rows[mine, row] = self.state[place, row]

    def write_back(self, start: int, end: int) -> None:
        """Store the call's rows where the sequence's table has a block for them."""
        self._copy(start, end, back=True)


def _compress(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(
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
        entries = x_TD.new_zeros(cos_ER2.shape[0], norm_weight.shape[0])
        cu, done = cu_seqlens.tolist(), 0
        for b, start in enumerate(start_pos.tolist()):
            end = start + cu[b + 1] - cu[b]
            if end == start:
                continue
            own = _PrivateState(state, state_table[b], start, end, ratio)
            for t, p in zip(range(cu[b], cu[b + 1]), range(start, end), strict=True):
                new = int((p + 1) % ratio == 0)
                angles = fresh(cos_ER2, done, done + new), fresh(sin_ER2, done, done + new)
                at = own.rows, own.table, _ONE, torch.tensor([p], dtype=torch.int32)
                row = fn(fresh(x_TD, t, t + 1), wkv, wgate, ape, norm_weight, *angles, *at, ratio=ratio, eps=eps)
                entries[done : done + new] = row
                done += new
            own.write_back(start, end)
        return entries

    return call


register("compress", _compress)
