"""Attention over paged rows: one kernel for prefill, the same with the rows of a query split over programs for decode.

Shapes as in ops/attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.cuda_triton.launch import NEED, SOC, blocks, kernels, power
from ops.attention import sparse_attention
from ops.cache import fp8_row_parts
from ops.paged import packed_rope_dim

BF16 = (torch.bfloat16,)
WIDEST = 512
_INT32 = 2**31
_PROGRAMS = 128
"""Programs below which the rows of a query are split, about one a multiprocessor."""
_SPLITS = 128
_MANY = 1024
"""Tokens of a call for which plans of prefill were measured to be better."""
_LONG = 32
"""Blocks of 32 rows from which all entries of a query pay for 64 rows a step in prefill."""
_SHORT = 64
"""Blocks of 32 rows up to which few queries are cut into single blocks."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a launch: heads and rows of a step, splits of a query's rows, warps and stages."""

    heads: int
    rows: int
    splits: int
    warps: int
    stages: int
    placed: bool = False
    """Whether a kernel of its own finds the rows of chosen entries first."""
    by_hand: int = 0
    """Rows of a step of the kernel with layouts by hand, which takes whole rows of 512 bf16 channels and heads in 64s; 0: not that one. No plan
    has it yet: a device judged an earlier form of that kernel only."""


def plan(tokens: int, heads: int, steps: int, packed: bool, chosen: bool) -> Plan:
    """Plan of a call whose queries have up to `steps` blocks of 32 rows. Chosen by measurement on an H100 (docs/cuda-kernels.md)."""
    if tokens <= 4 and steps <= _SHORT:
        # one block of rows a program: nothing is left to overlap, and small programs share a multiprocessor
        together = min(16, power(heads, 16))
        splits = min(blocks(2 * _PROGRAMS, tokens * blocks(heads, together)), steps, _SPLITS)
        return Plan(together, 32, max(splits, 1), 4, 2)
    together = min(64, power(heads, 16))
    warps = 8 if together == 64 else 4
    splits = max(min(blocks(_PROGRAMS, tokens * blocks(heads, together)), steps, _SPLITS), 1)
    if packed:
        splits = min(splits, blocks(steps, 2))
        return Plan(together, 64, splits, warps, 3 if splits == 1 else 2, chosen and splits == 1)
    # three stages: an index and a table entry are read before the row that they name; 64 rows a step pay, spills included, once their
    # places need no registers
    placed = chosen and splits == 1
    many = splits == 1 and tokens >= _MANY
    if placed or (many and not chosen and steps >= _LONG):
        return Plan(together, 64, splits, warps, 3 if placed else 2, placed)
    return Plan(together, 32, splits, warps, 3, placed)


def row_bytes(channels: int, rope_dim: int) -> int:
    """Bytes of a packed row."""
    return sum(fp8_row_parts(channels, rope_dim))


def unit_of(window: Tensor, entries: Tensor, row: int, scales: int) -> int:
    """Elements that rows, their scales and blocks of both caches are multiples of."""
    return math.gcd(row, scales, window.stride(0), entries.stride(0))


def alignment(cache: Tensor, row: int) -> int:
    """Bytes, 16 at most, of which the address of every row of `row` elements is a multiple."""
    size = cache.element_size()
    return math.gcd(16, cache.data_ptr(), row * size, cache.stride(0) * size)


def _parts(channels: int, cache: Tensor) -> tuple[int, int, int]:
    """Channels that are not rotary, elements of a row, and bytes of its scales."""
    if cache.dtype != torch.uint8:
        return channels, channels, 0
    rope_dim = packed_rope_dim("sparse_attention", cache.shape[2], channels)
    return channels - rope_dim, *fp8_row_parts(channels, rope_dim)


def _countable(channels: int, window: Tensor, entries: Tensor) -> bool:
    """Whether the place of every row, in units, is an int32."""
    furthest = max(window.shape[0] * window.stride(0), entries.shape[0] * entries.stride(0))
    return furthest < _INT32 or furthest // unit_of(window, entries, *_parts(channels, window)[1:]) < _INT32


def _apart(cache: Tensor) -> bool:
    # whole blocks may lie apart, rows of a block may not
    return cache.dim() == 3 and cache.stride(2) == 1 and (cache.shape[1] == 1 or cache.stride(1) == cache.shape[2])


def _cache_fits(q_THC: Tensor, cache: Tensor, packed: bool) -> bool:
    if not _apart(cache) or packed != (cache.dtype == torch.uint8):
        return False
    if packed:
        channels = q_THC.shape[2]
        return any(sum(fp8_row_parts(channels, r)) == cache.shape[2] for r in range(0, channels, 2)) and cache.stride(0) % 2 == 0
    return cache.dtype == q_THC.dtype and cache.shape[2] == q_THC.shape[2]


def _fits(
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
) -> bool:
    if q_THC.dim() != 3 or q_THC.dtype != torch.bfloat16 or not q_THC.is_contiguous() or not q_THC.numel():
        return False
    tokens, heads, channels = q_THC.shape
    batch = start_pos.shape[0]
    packed = window_cache.dtype == torch.uint8
    lists = cu_seqlens.shape == (batch + 1,) and cu_seqlens.dtype == start_pos.dtype == window_table.dtype == torch.int32
    rest = sink_H.shape == (heads,) and sink_H.dtype == torch.float32 and window >= 1 and channels <= WIDEST
    if not (lists and rest and window_table.dim() == 2 and window_table.shape[0] == batch and _cache_fits(q_THC, window_cache, packed)):
        return False
    if cmp_cache is None or cmp_table is None:
        return cmp_cache is None and cmp_table is None and cmp_index is None and _countable(channels, window_cache, window_cache)
    entries = ratio >= 1 and cmp_table.dtype == torch.int32 and cmp_table.dim() == 2 and cmp_table.shape[0] == batch
    index = cmp_index is None or (cmp_index.dim() == 2 and cmp_index.shape[0] == tokens and cmp_index.dtype == torch.int32)
    return entries and index and _cache_fits(q_THC, cmp_cache, packed) and _countable(channels, window_cache, cmp_cache)


@sparse_attention.implement("cuda_triton", dtypes=BF16, soc=SOC, needs=[NEED], when=_fits, note=f"bf16, up to {WIDEST} channels")
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
    tokens, heads, channels = q_THC.shape
    device, batch, packed = q_THC.device, start_pos.shape[0], window_cache.dtype == torch.uint8
    nope, row, scale_bytes = _parts(channels, window_cache)
    kind = 0 if cmp_cache is None else 1 if cmp_index is None else 2
    # kinds that do not have a tensor pass one that is there and is not read
    entries, entry_table = (window_cache, window_table) if cmp_cache is None or cmp_table is None else (cmp_cache, cmp_table)
    tables = [t.to(device).contiguous() for t in (window_table, entry_table, entry_table if cmp_index is None else cmp_index)]
    align = min(alignment(entries, row), alignment(window_cache, row))
    unit = unit_of(window_cache, entries, row, scale_bytes)
    cu, start = cu_seqlens.to(device), start_pos.to(device)
    chosen = 0 if cmp_index is None else cmp_index.shape[1]
    most = chosen if kind == 2 else entry_table.shape[1] * entries.shape[1] if kind == 1 else 0
    launch = plan(tokens, heads, blocks(most, 32) + blocks(window, 32), packed, kind == 2)
    listed, rows = tables[2], None
    by_hand = launch.by_hand > 0 and not packed and channels == WIDEST and heads % 64 == 0 and align == 16
    if by_hand or (launch.placed and kind == 2):
        listed, rows = _places(tables, cu, start, window_cache, entries, most, window, unit, row, scale_bytes, tokens, max(ratio, 1), kind == 2)
        kind = 3
    out = torch.empty_like(q_THC)
    if by_hand:
        module = kernels("attention_hopper")
        kernel = module.attend_ahead if launch.by_hand == 32 else module.attend_placed
        kernel[(tokens, heads // 64)](
            q_THC, window_cache, entries, listed, rows, sink_H, out, heads, most + window, scale, UNIT=unit, H=64, C=channels, N=launch.by_hand,
            num_warps=8,
        )  # fmt: skip
        return out
    wide = power(channels, 16)
    if launch.splits == 1:
        parts, sums = out, sink_H
    else:
        parts = torch.empty(launch.splits, tokens, heads, channels, dtype=torch.float32, device=device)
        sums = torch.empty(launch.splits, tokens, heads, 2, dtype=torch.float32, device=device)
    kernels("attention").attend[(tokens, blocks(heads, launch.heads), launch.splits)](
        q_THC, window_cache, tables[0], entries, tables[1], listed, sink_H, cu, start, parts, sums,
        tokens, heads, batch, window, window_table.shape[1], window_cache.stride(0) // unit, entry_table.shape[1],
        entries.stride(0) // unit, chosen, ratio, scale, CHANNELS=channels, NOPE=nope, WINDOW_PER_BLOCK=window_cache.shape[1],
        CMP_PER_BLOCK=entries.shape[1], ROW=row, UNIT=unit, ROW_UNITS=row // unit, SCALE_UNITS=scale_bytes // unit, ALIGN=align,
        PACKED=packed, KIND=kind, BATCH=power(batch), SPLITS=launch.splits, BLOCK_H=launch.heads, BLOCK_N=launch.rows,
        BLOCK_C=power(nope, 16), BLOCK_R=power(channels - nope, 16), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if launch.splits > 1:
        padded = power(launch.splits)
        block = max(min(wide, 8192 // padded), 16)
        kernels("attention").combine[(tokens * heads, blocks(channels, block))](
            parts, sums, sink_H, out, tokens * heads, heads, launch.splits, CHANNELS=channels, SPLITS=padded, BLOCK_C=block, num_warps=4
        )
    return out


def _places(
    tables: list[Tensor], cu: Tensor, start: Tensor, window_cache: Tensor, entries: Tensor, most: int, window: int, unit: int, row: int,
    scales: int, tokens: int, ratio: int, chosen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the rows of every token begin [T, 1, most + window], with scales [T, 2, most + window]; how many entries and rows [T, 2]."""
    window_table, entry_table, index = tables
    batch, block = start.shape[0], 256
    out = torch.empty(tokens, 2 if scales else 1, most + window, dtype=torch.int32, device=window_cache.device)
    rows = torch.empty(tokens, 2, dtype=torch.int32, device=window_cache.device)
    kernels("attention").places[(tokens, blocks(most + window, block))](
        index, window_table, entry_table, cu, start, out, rows, batch, window, window_table.shape[1], window_cache.stride(0) // unit,
        entry_table.shape[1], entries.stride(0) // unit, most, ratio, CHOSEN=chosen, WINDOW_PER_BLOCK=window_cache.shape[1],
        CMP_PER_BLOCK=entries.shape[1], ROW_UNITS=row // unit, SCALE_UNITS=scales // unit, PACKED=scales > 0, BATCH=power(batch),
        BLOCK=block, num_warps=2,
    )  # fmt: skip
    return out, rows
