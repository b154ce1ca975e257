"""The compressor: two projections over all tokens, then poolings over views of the state and of the call's rows.

Shapes as in ops/compress.py; n tokens of one sequence, N of its entries pooled together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.cpu.linear import matmul_nt
from ops.compress import compress

Ints = NDArray[np.int32]


def _positions(counts: list[int], starts: list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])


def _add_ape(s_Tw: Tensor, ape: Tensor, counts: list[int], starts: list[int]) -> None:
    tokens, ratio = s_Tw.shape[0], ape.shape[0]
    if len(counts) > 1:
        s_Tw += ape[torch.from_numpy(_positions(counts, starts) % ratio).to(ape.device)]
    elif tokens == 1:
        s_Tw += ape[starts[0] % ratio]
    else:
        # one long sequence: the rows of ape repeat, so no [T, w] copy of them is needed
        turned, whole = ape.roll(-(starts[0] % ratio), 0), tokens - tokens % ratio
        s_Tw[:whole].view(-1, *ape.shape).add_(turned)
        s_Tw[whole:] += turned[: tokens - whole]


class _Stretch:
    """k and s of one sequence's consecutive tokens: those before `start` in the state, the others of this call."""

    def __init__(self, k_nw: Tensor, s_nw: Tensor, state: Tensor, blocks: Ints, start: int, ratio: int, c: int) -> None:
        self.k_nw, self.s_nw, self.state, self.blocks = k_nw, s_nw, state, blocks
        self.start, self.ratio, self.c, self.overlap = start, ratio, c, int(k_nw.shape[1] > c)

    def _block(self, i: int, half: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of block i, channels of one half: [<= m, c] pieces of k and of s."""
        low, high, w, per_block = i * self.ratio, (i + 1) * self.ratio, self.k_nw.shape[1], self.state.shape[1]
        left, right = half * self.c, (half + 1) * self.c
        k, s = [], []
        while low < self.start and low < high:
            block, row = divmod(low, per_block)
            rows = self.state[int(self.blocks[block]), row : row + min(high, self.start) - low]
            k.append(rows[:, left:right])
            s.append(rows[:, w + left : w + right])
            low += rows.shape[0]
        if low < high:
            call = slice(low - self.start, high - self.start)
            k.append(self.k_nw[call, left:right])
            s.append(self.s_nw[call, left:right])
        return k, s

    def entry(self, i: int) -> Tensor:
        """Pooled entry i [c], from wherever its tokens are; entry 0 has no previous block."""
        k, s = self._block(i, self.overlap)
        if self.overlap and i:
            k_before, s_before = self._block(i - 1, 0)
            k, s = k_before + k, s_before + s
        k_Sc, s_Sc = (torch.cat(p) if len(p) > 1 else p[0] for p in (k, s))
        return torch.softmax(s_Sc, dim=0).mul_(k_Sc).sum(0)

    def entries(self, first: int, end: int) -> Tensor:
        """Pooled entries [end - first, c] whose tokens are all of this call."""
        call = slice((first - self.overlap) * self.ratio - self.start, end * self.ratio - self.start)
        k, s = (t[call].view(-1, self.ratio, t.shape[1]) for t in (self.k_nw, self.s_nw))
        if self.overlap:
            k, s = (torch.cat((t[:-1, :, : self.c], t[1:, :, self.c :]), dim=1) for t in (k, s))
        return torch.softmax(s, dim=1).mul_(k).sum(1)

    def pool(self, out_Nc: Tensor) -> None:
        """Fill the entries start // m .. : those that reach before this call one by one (at most two), the rest together."""
        first = self.start // self.ratio
        alone = min(out_Nc.shape[0], self.overlap + (self.start % self.ratio > 0))
        for j in range(alone):
            out_Nc[j] = self.entry(first + j)
        if alone < out_Nc.shape[0]:
            out_Nc[alone:] = self.entries(first + alone, first + out_Nc.shape[0])


def _norm_rope(pooled_Nc: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm and rotation, fp32; pooled_Nc is fp32 and may be overwritten."""
    y = pooled_Nc.mul_(torch.rsqrt(pooled_Nc.square().mean(-1, keepdim=True).add_(eps))).mul_(norm_weight)
    if rotary := 2 * cos.shape[1]:
        pairs = torch.view_as_complex(y[:, -rotary:].view(-1, rotary // 2, 2))
        pairs.mul_(torch.complex(cos, sin))
    return y


def _store(k_Tw: Tensor, s_Tw: Tensor, state: Tensor, table: Ints, counts: list[int], starts: list[int]) -> None:
    per_block, w = state.shape[1], k_Tw.shape[1]
    if k_Tw.shape[0] == 1:
        b = counts.index(1)
        block, row = divmod(starts[b], per_block)
        if stored := int(table[b, block]):
            target = state[stored, row]
            target[:w] = k_Tw[0]
            target[w:] = s_Tw[0]
        return
    owner, position = np.repeat(np.arange(len(counts)), counts), _positions(counts, starts)
    block_T = table[owner, position // per_block].astype(np.int64)
    kept = np.flatnonzero(block_T)
    if len(kept) < len(block_T):
        chosen = torch.from_numpy(kept).to(state.device)
        k_Tw, s_Tw = k_Tw[chosen], s_Tw[chosen]
    rows = torch.from_numpy(block_T[kept] * per_block + position[kept] % per_block).to(state.device)
    state_R2w = state.view(-1, 2 * w)
    state_R2w[rows, :w] = k_Tw
    state_R2w[rows, w:] = s_Tw


@compress.implement("cpu")
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
    cu, starts, table, c = cu_seqlens.tolist(), start_pos.tolist(), state_table.cpu().numpy(), norm_weight.shape[0]
    if not cu[-1]:
        return x_TD.new_zeros(cos_ER2.shape[0], c)
    x = x_TD[: cu[-1]].float()
    k, s = matmul_nt(x, wkv.float()), matmul_nt(x, wgate.float())
    counts = [high - low for low, high in zip(cu, cu[1:], strict=False)]
    made = [(start + n) // ratio - start // ratio for start, n in zip(starts, counts, strict=True)]
    pooled, done = k.new_empty(sum(made), c), 0
    _add_ape(s, ape, counts, starts)
    for b, new in enumerate(made):
        if new:
            call = slice(cu[b], cu[b + 1])
            _Stretch(k[call], s[call], state, table[b], starts[b], ratio, c).pool(pooled[done : done + new])
            done += new
    _store(k, s, state, table, counts, starts)
    if not done:
        return x_TD.new_zeros(cos_ER2.shape[0], c)
    cast = pooled.to(x_TD.dtype).float()
    y = _norm_rope(cast, norm_weight.float(), cos_ER2[:done], sin_ER2[:done], eps).to(x_TD.dtype)
    return y if done == cos_ER2.shape[0] else torch.cat((y, y.new_zeros(cos_ER2.shape[0] - done, c)))
