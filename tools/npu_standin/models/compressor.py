"""The fused compressor. Shapes: T tokens of B requests, H hidden, D entry width, c = coff, w = c*D, m = cmp_ratio, R output rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, needed, require, require_dtype, require_shape, undefined
from tools.npu_standin.models.rope import interleaved

OP = "compressor"
KINDS = {(2, 4, 512): "C4A", (2, 4, 128): "C4Li", (1, 128, 512): "C128A"}
"""(coff, cmp_ratio, D) that have kernels."""


class _State:
    """The paged state: row p % block_size of block table[b][p // block_size]; block 0 is no block."""

    def __init__(self, cache: Tensor, table: Tensor | None) -> None:
        self.cache, self.table, self.rows = cache, table, cache.shape[1]

    def block(self, b: int, position: int) -> int:
        """The block of a position, 0 when it is not kept."""
        if self.table is None:
            return 0
        column = position // self.rows
        require(
            column < self.table.shape[1],
            OP,
            f"position {position}",
            f"inside the {self.table.shape[1]} blocks of state_block_table",
        )
        found = int(self.table[b, column])
        require(0 <= found < self.cache.shape[0], OP, f"block {found}", f"0 <= block < {self.cache.shape[0]}")
        return found

    def read(self, b: int, position: int) -> Tensor:
        """Row of an earlier token; it must have been kept."""
        block = self.block(b, position)
        require(
            block != 0,
            OP,
            f"position {position} of request {b} in block 0",
            "a kept block: block 0 is reserved and its content undefined",
        )
        return self.cache[block, position % self.rows]

    def write(self, b: int, position: int, row: Tensor) -> None:
        """Keep the row of a token, unless its block is 0."""
        if block := self.block(b, position):
            self.cache[block, position % self.rows] = row


def _starts(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, start_pos: Tensor | None) -> list[tuple[int, int, int]]:
    """(first row of x, tokens used, absolute position of the first) of every request."""
    cu = needed(OP, "cu_seqlens (x is [T, H])", cu_seqlens)
    require_dtype(OP, "cu_seqlens", cu, torch.int32)
    ends = cu.tolist()
    legal = bool(ends) and ends[0] == 0 and ends == sorted(ends) and ends[-1] <= x.shape[0]
    require(legal, OP, f"cu_seqlens {ends}", f"rising from 0 to at most T = {x.shape[0]}")
    first, length = ends[:-1], [b - a for a, b in zip(ends, ends[1:])]  # noqa: B905
    batch = len(first)
    for name, vector in (("seqused", seqused), ("start_pos", start_pos)):
        if vector is not None:
            require_dtype(OP, name, vector, torch.int32)
            require_shape(OP, name, vector, batch)
    used = length if seqused is None else seqused.tolist()
    begin = [0] * batch if start_pos is None else start_pos.tolist()
    require(all(0 <= u <= n for u, n in zip(used, length, strict=True)), OP, f"seqused {used}", f"at most the lengths {length}")
    require(all(s >= 0 for s in begin), OP, f"start_pos {begin}", "no negative position")
    return list(zip(first, used, begin, strict=True))


def _check(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    state_cache: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    coff: int,
    cmp_ratio: int,
    seqused: Tensor | None,
) -> None:
    require(x.dim() == 2, OP, f"x {list(x.shape)}", "[T, H] ([B, S, H] is documented too and not modelled)")
    require_dtype(OP, "x", x, torch.bfloat16, torch.float16)
    hidden, width = x.shape[-1], norm_weight.shape[0]
    require(1024 <= hidden <= 10240 and hidden % 512 == 0, OP, f"H = {hidden}", "1024..10240, a multiple of 512")
    require(hidden != 7168 or seqused is not None, OP, "seqused None at H = 7168",
            "seqused given: without it a kernel template is chosen that is misaligned for H = 7168 (wrong from the 4th token on)")  # fmt: skip
    require((coff, cmp_ratio, width) in KINDS, OP, f"coff {coff}, cmp_ratio {cmp_ratio}, D {width}", f"one of {sorted(KINDS)}")
    for name, weight in (("wkv", wkv), ("wgate", wgate)):
        require_dtype(OP, name, weight, x.dtype)
        require_shape(OP, name, weight, coff * width, hidden)
    require_dtype(OP, "state_cache", state_cache, torch.float32)
    require_shape(OP, "state_cache", state_cache, None, None, 2 * coff * width)
    require_dtype(OP, "ape", ape, torch.float32)
    require_shape(OP, "ape", ape, cmp_ratio, coff * width)
    require_dtype(OP, "norm_weight", norm_weight, torch.float32)
    require_shape(OP, "norm_weight", norm_weight, width)


def _pooled(keep: dict[int, Tensor], state: _State, b: int, entry: int, m: int, c: int, overlap: bool) -> Tensor:
    """Softmax-pooled kv of one entry, fp32 [D]; tokens of this call come from `keep`, earlier ones from the state."""

    def rows(block: int) -> Tensor:
        return torch.stack([keep[p] if p in keep else state.read(b, p) for p in range(block * m, (block + 1) * m)])

    own = rows(entry)
    half = own.shape[1] // 2
    kv, score = own[:, half - c : half], own[:, 2 * half - c :]
    if overlap and entry > 0:
        before = rows(entry - 1)
        kv, score = torch.cat((before[:, :c], kv)), torch.cat((before[:, half : half + c], score))
    return (score.softmax(0) * kv).sum(0)


@model("custom::compressor")
def compressor(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    state_cache: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    rope_head_dim: int,
    cmp_ratio: int,
    *,
    state_block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    start_pos: Tensor | None = None,
    coff: int = 1,
    norm_eps: float = 1e-6,
    rotary_mode: int = 1,
    cache_mode: int = 1,
) -> Tensor:
    """Entries completed by this call, [R, D] in the type of x, request after request, normed and rotated; the rows behind them are undefined.

    x [T, H] with cu_seqlens; seqused counts the tokens of a request that are real. Kept state of a token: kv [w] and
    score [w] + ape, fp32. rope_sin (first) and rope_cos fp32 [R, 64], one row per output row, every angle twice,
    R = min(T, T // m + B). R comes from rope_sin alone in the vendor's code: another number of rows would change the output
    in silence and is refused here.
    """
    _check(x, wkv, wgate, state_cache, ape, norm_weight, coff, cmp_ratio, seqused)
    require(rotary_mode == 2, OP, f"rotary_mode {rotary_mode}", "2 (interleaved); 1, the default, has no kernel")
    require(cache_mode == 1, OP, f"cache_mode {cache_mode}", "1")
    require(rope_head_dim == 64, OP, f"rope_head_dim {rope_head_dim}", "64")
    requests = _starts(x, cu_seqlens, seqused, start_pos)
    batch, tokens, width = len(requests), x.shape[0], norm_weight.shape[0]
    require(tokens > 0, OP, "T = 0", "at least one token")
    rows = min(tokens, tokens // cmp_ratio + batch)
    for name, table in (("rope_sin", rope_sin), ("rope_cos", rope_cos)):
        require_dtype(OP, name, table, torch.float32)
        require_shape(OP, name, table, rows, 64)
    if state_block_table is not None:
        require_dtype(OP, "state_block_table", state_block_table, torch.int32)
        require_shape(OP, "state_block_table", state_block_table, batch, None)
    else:
        require(
            all(begin == 0 for _, _, begin in requests),
            OP,
            "start_pos without state_block_table",
            "a table: None starts from zero and keeps nothing",
        )
    kv, score = x.float() @ wkv.float().T, x.float() @ wgate.float().T
    state, entries = _State(state_cache, state_block_table), []
    for b, (first, used, begin) in enumerate(requests):
        keep = {begin + i: torch.cat((kv[first + i], score[first + i] + ape[(begin + i) % cmp_ratio])) for i in range(used)}
        entries += [
            _pooled(keep, state, b, entry, cmp_ratio, width, coff == 2)
            for entry in range(begin // cmp_ratio, (begin + used) // cmp_ratio)
        ]
        for position, row in keep.items():
            state.write(b, position, row)
    return _finished(entries, rope_sin, rope_cos, norm_weight, norm_eps, x.dtype)


def _finished(
    entries: list[Tensor], sin: Tensor, cos: Tensor, norm_weight: Tensor, norm_eps: float, dtype: torch.dtype
) -> Tensor:
    width = norm_weight.shape[0]
    result = undefined((sin.shape[0], width), dtype)
    if entries:
        pooled, n = torch.stack(entries), len(entries)
        normed = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + norm_eps) * norm_weight
        turned = interleaved(normed[:, width - 64 :], cos[:n], sin[:n])
        result[:n] = torch.cat((normed[:, : width - 64], turned), 1).to(dtype)
    return result
