"""Ragged batches over paged rows as the attention ops see them: which token sits where, slots of rows, checks, sample caches.

T tokens over B sequences; logical row r of sequence b lies in block table[b, r // P], row r % P; block 0 means "not stored".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ops.cache import FP4_GROUP, cache_insert, cache_insert_fp8, fp8_row_parts, index_insert_fp4, index_insert_fp8


def tokens(cu_seqlens: Tensor, start_pos: Tensor) -> Iterator[tuple[int, int, int]]:
    """(sequence, token index of the call, absolute position) of every token, in order."""
    cu = cu_seqlens.tolist()
    for b, start in enumerate(start_pos.tolist()):
        for t in range(cu[b], cu[b + 1]):
            yield b, t, start + t - cu[b]


def spans(cu_seqlens: Tensor, start_pos: Tensor) -> list[tuple[int, int]]:
    """(first position, end position) of this call's tokens for every sequence that has any."""
    counts = cu_seqlens.diff().tolist()
    return [(start, start + n) for start, n in zip(start_pos.tolist(), counts, strict=True) if n]


def visible_pairs(first: int, end: int, ratio: int, limit: int | None = None) -> int:
    """Sum of min((p+1) // ratio, limit) over the positions first..end-1: pairs of a query and an entry it can see."""

    def below(n: int, top: int) -> int:  # sum over counts 1..n of min(count // ratio, top)
        if n >= (top + 1) * ratio:
            return below((top + 1) * ratio - 1, top) + (n + 1 - (top + 1) * ratio) * top
        full, rest = divmod(n + 1, ratio)
        return ratio * (full * (full - 1) // 2) + rest * full

    top = end // ratio if limit is None else limit
    return below(end, top) - below(first, top)


def row_slots(table_row: Tensor, rows: Tensor, block_rows: int) -> Tensor:
    """Flat slots (block * P + row) int64 of logical rows of one sequence."""
    rows = rows.to(torch.int64)
    return table_row[rows // block_rows].to(torch.int64) * block_rows + rows % block_rows


def packed_rope_dim(op: str, width: int, channels: int) -> int:
    """Rotary channels of packed FP8 rows of `width` bytes for `channels` channels. ValueError when no layout has that width."""
    for rope_dim in range(0, channels, 2):
        if sum(fp8_row_parts(channels, rope_dim)) == width:
            return rope_dim
    expected = sum(fp8_row_parts(channels, min(64, channels // 2)))
    raise ValueError(
        f"{op}: packed rows are {width} bytes, but no split of {channels} channels into FP8 and rotary channels takes that many "
        f"(for instance {expected} bytes with {min(64, channels // 2)} rotary channels)"
    )


def is_packed_index(width: int, channels: int) -> bool:
    """Whether `width` bytes are an FP8 (d + 4) or FP4 (d/2 + d/32) index key of `channels` channels."""
    return width == channels + 4 or (channels % FP4_GROUP == 0 and width == channels // 2 + channels // FP4_GROUP)


def check_batch(op: str, count: int, cu_seqlens: Tensor, start_pos: Tensor) -> None:
    """ValueError unless cu_seqlens int32 [B+1] rises from 0 to `count` and start_pos int32 [B] is not negative."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.numel():
        raise ValueError(f"{op}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected torch.int32 [B + 1]")
    if start_pos.dtype != torch.int32 or start_pos.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"{op}: start_pos is {start_pos.dtype} {tuple(start_pos.shape)}, expected torch.int32 ({cu_seqlens.shape[0] - 1},)"
        )
    cu = cu_seqlens.tolist()
    if cu[0] != 0 or cu[-1] != count or cu != sorted(cu):
        raise ValueError(f"{op}: cu_seqlens is {cu}, expected offsets rising from 0 to {count}, the number of tokens")
    if start_pos.numel() and int(start_pos.min()) < 0:
        raise ValueError(f"{op}: start_pos has {int(start_pos.min())}, expected positions from 0")


def check_rows(op: str, name: str, cache: Tensor, table: Tensor, needed: Sequence[tuple[int, int]]) -> None:
    """ValueError unless `table` int32 [B, blocks] names stored blocks of `cache` for every needed (first, end) of rows."""
    if cache.dim() != 3 or not cache.shape[1]:
        raise ValueError(f"{op}: {name} cache has shape {tuple(cache.shape)}, expected [blocks, P, W]")
    if table.dim() != 2 or table.dtype != torch.int32 or table.shape[0] != len(needed):
        found = f"{table.dtype} {tuple(table.shape)}"
        raise ValueError(f"{op}: {name} table is {found}, expected torch.int32 ({len(needed)}, blocks)")
    for b, (first, end) in enumerate(needed):
        if first >= end:
            continue
        low, high = first // cache.shape[1], (end - 1) // cache.shape[1] + 1
        if high > table.shape[1]:
            raise ValueError(
                f"{op}: {name} table has {table.shape[1]} blocks per sequence, sequence {b} needs {high} for row {end - 1}"
            )
        least, most = (int(i) for i in table[b, low:high].aminmax())
        if least < 1 or most >= cache.shape[0]:
            raise ValueError(
                f"{op}: {name} table of sequence {b} names blocks {least}..{most} for rows {first}..{end - 1}, "
                f"expected 1..{cache.shape[0] - 1} (0 means not stored)"
            )


def paged(
    rows_of: Sequence[Tensor],
    block_rows: int,
    g: torch.Generator,
    *,
    layout: str = "plain",
    rope_dim: int = 64,
    ordered: bool = False,
) -> tuple[Tensor, Tensor]:
    """A sample cache holding rows_of[b] [n_b, W] as logical rows 0.. of sequence b, and its table.

    layout: "plain", "fp8" (attention rows), "index8", "index4". Blocks lie in random order unless `ordered`; rows that belong to
    nobody hold large finite values, so that reading one shows.
    """
    counts = [-(-r.shape[0] // block_rows) for r in rows_of]
    total, width = sum(counts) + 1, rows_of[0].shape[1]
    order = torch.arange(total - 1) if ordered else torch.randperm(total - 1, generator=g)
    table = torch.zeros(len(rows_of), max(max(counts), 1), dtype=torch.int32)
    for b, n in enumerate(counts):
        table[b, :n] = order[sum(counts[:b]) : sum(counts[:b]) + n] + 1
    bytes_of = {
        "fp8": sum(fp8_row_parts(width, rope_dim)),
        "index8": width + 4,
        "index4": width // 2 + width // FP4_GROUP,
    }
    if layout == "plain":
        cache = torch.full((total, block_rows, width), 999.0, dtype=rows_of[0].dtype)
    else:
        cache = torch.full((total, block_rows, bytes_of[layout]), 0x47, dtype=torch.uint8)
    for b, rows in enumerate(rows_of):
        slots = row_slots(table[b], torch.arange(rows.shape[0]), block_rows)
        if layout == "plain":
            cache_insert.reference(cache, rows, slots)
        elif layout == "fp8":
            cache_insert_fp8.reference(cache, rows, slots, rope_dim=rope_dim)
        else:
            (index_insert_fp8 if layout == "index8" else index_insert_fp4).reference(cache, rows, slots)
    return cache, table
