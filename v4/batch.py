"""What one call of the graph needs to know about its tokens: offsets, positions, slots, rotary rows.

Built once per call on the host and shared by all layers. T tokens over B sequences, E entries completed by the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from v4 import rope
from v4.cache import HOST, Cache, Sequence


@dataclass(frozen=True)
class Entries:
    """Entries of one ratio completed by this call: their cache slots int64 [E] and rotary rows [E, R2] at position i*m."""

    slots: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Batch:
    """Metadata of one call.

    ids int64 [T]; cu_seqlens int32 [B+1]; start_pos int32 [B]; positions int64 [T]; tables: group -> int32 [B, blocks];
    window_slots int64 [T]; rope: compressed? -> (cos, sin) [T, R2]; entries: ratio -> Entries.
    """

    ids: Tensor
    cu_seqlens: Tensor
    start_pos: Tensor
    positions: Tensor
    tables: dict[str, Tensor]
    window_slots: Tensor
    rope: dict[bool, tuple[Tensor, Tensor]]
    entries: dict[int, Entries]

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[0]


def padded(batch: Batch) -> Batch:
    """A step of several sequences with few shapes: as many entries as sequences where any is completed; those added are not stored (slot -1)."""
    rows = batch.start_pos.shape[0]

    def filled(made: Entries) -> Entries:
        missing = rows - made.slots.shape[0]
        if missing in (0, rows):
            return made
        more = made.cos.new_zeros(missing, made.cos.shape[1])
        return Entries(torch.cat([made.slots, made.slots.new_full((missing,), -1)]), torch.cat([made.cos, more + 1]), torch.cat([made.sin, more]))

    return replace(batch, entries={m: filled(made) for m, made in batch.entries.items()})


def tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a call under names that `of_tensors` understands."""
    named = {name: getattr(batch, name) for name in _PLAIN}
    named |= {f"table {name}": t for name, t in batch.tables.items()}
    for kind, (cos, sin) in batch.rope.items():
        named |= {f"cos {int(kind)}": cos, f"sin {int(kind)}": sin}
    for m, made in batch.entries.items():
        named |= {f"entries {m} slots": made.slots, f"entries {m} cos": made.cos, f"entries {m} sin": made.sin}
    return named


def of_tensors(named: Mapping[str, Tensor]) -> Batch:
    """The call that `tensors` took apart, with the tensors given."""
    kinds = [bool(int(name[4:])) for name in named if name.startswith("cos ")]
    ratios = [int(name.split()[1]) for name in named if name.startswith("entries ") and name.endswith(" slots")]
    return Batch(
        **{name: named[name] for name in _PLAIN},
        tables={name[6:]: t for name, t in named.items() if name.startswith("table ")},
        rope={kind: (named[f"cos {int(kind)}"], named[f"sin {int(kind)}"]) for kind in kinds},
        entries={m: Entries(*(named[f"entries {m} {part}"] for part in ("slots", "cos", "sin"))) for m in ratios},
    )


def _ids(ids: Seq[int] | Tensor) -> Tensor:
    return ids.to(torch.int64) if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.int64, device=HOST)


_PLAIN = ("ids", "cu_seqlens", "start_pos", "positions", "window_slots")


class RopeTables:
    """Frequencies of both rotary kinds, kept per model."""

    def __init__(self, plain_R2: Tensor, compressed_R2: Tensor) -> None:
        self.by_kind = {False: plain_R2, True: compressed_R2}

    def no_entries(self, device: torch.device) -> Entries:
        """What most single steps complete: nothing."""
        nothing = self.by_kind[True].new_empty(0, self.by_kind[True].shape[0], device=device)
        return Entries(torch.empty(0, dtype=torch.int64, device=device), nothing, nothing)


def _slots(table: Tensor, sequence_of_row: np.ndarray, rows: np.ndarray, block_rows: int) -> Tensor:
    blocks = table.numpy()[sequence_of_row, rows // block_rows].astype(np.int64)
    return torch.from_numpy(np.where(blocks > 0, blocks * block_rows + rows % block_rows, -1))


def build(cache: Cache, tables: RopeTables, sequences: Seq[Sequence], ids: Seq[Seq[int] | Tensor], device: torch.device) -> Batch:
    """Reserve cache rows for `ids[b]` new tokens of `sequences[b]` and lay out the call. Does not advance the sequences.

    Raises CacheFull when a sequence outgrows the cache, ValueError when the two lists differ in length.
    """
    if len(sequences) != len(ids):
        raise ValueError(f"found {len(sequences)} sequences and {len(ids)} token lists, expected as many")
    if len(ids) == 1 and len(ids[0]) == 1:
        return _step(cache, tables, sequences[0], ids[0], device)
    return _several(cache, tables, sequences, ids, device)


def _step(cache: Cache, tables: RopeTables, sequence: Sequence, ids: Seq[int] | Tensor, device: torch.device) -> Batch:
    """One token of one sequence, the same without arrays: a step of a small model is short beside what `_several` takes."""
    cache.reserve(sequence, 1)
    position, slot = sequence.length, sequence.slot

    def place(group: str, row: int) -> Tensor:
        g = cache.groups[group]
        block, rows = int(g.table[slot, row // g.spec.block_rows]), g.spec.block_rows
        return torch.tensor([block * rows + row % rows if block > 0 else -1], device=device)

    def angles(kind: bool, at: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rope.rows(tables.by_kind[kind], at)
        return cos.to(device), sin.to(device)

    entries: dict[int, Entries] = {}
    for m in sorted(set(cache.ratios) - {0}):
        if (position + 1) % m:
            entries[m] = tables.no_entries(device)
        else:
            row = position // m
            entries[m] = Entries(place(f"entries{m}", row), *angles(True, torch.tensor([row * m], device=HOST)))
    positions_T = torch.tensor([position], device=HOST)
    return Batch(
        ids=_ids(ids).to(device),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=HOST),
        start_pos=torch.tensor([position], dtype=torch.int32, device=HOST),
        positions=positions_T,
        tables={name: g.table[slot : slot + 1] for name, g in cache.groups.items()},
        window_slots=place("window", position),
        rope={kind: angles(kind, positions_T) for kind in {bool(m) for m in cache.ratios}},
        entries=entries,
    )


def _several(
    cache: Cache, tables: RopeTables, sequences: Seq[Sequence], ids: Seq[Seq[int] | Tensor], device: torch.device
) -> Batch:
    counts = np.array([len(i) for i in ids], dtype=np.int64)
    starts = np.array([s.length for s in sequences], dtype=np.int64)
    for sequence, n in zip(sequences, counts.tolist(), strict=True):
        if n:
            cache.reserve(sequence, n)
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    owner = np.repeat(np.arange(len(ids)), counts)
    positions = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1] - starts, counts)
    rows = torch.tensor([s.slot for s in sequences], dtype=torch.int64, device=HOST)
    whole = len(sequences) == 1
    slot = sequences[0].slot if whole else 0
    group_tables = {
        name: g.table[slot : slot + 1] if whole else g.table.index_select(0, rows) for name, g in cache.groups.items()
    }
    positions_T = torch.from_numpy(positions)
    entries: dict[int, Entries] = {}
    for m in sorted(set(cache.ratios) - {0}):
        made = (starts + counts) // m - starts // m
        if not made.any():
            entries[m] = tables.no_entries(device)
            continue
        entry_owner = np.repeat(np.arange(len(ids)), made)
        before = np.concatenate([[0], np.cumsum(made)[:-1]])
        index = np.arange(int(made.sum())) - np.repeat(before - starts // m, made)
        block_rows = cache.groups[f"entries{m}"].spec.block_rows
        slots = _slots(group_tables[f"entries{m}"], entry_owner, index, block_rows)
        cos, sin = rope.rows(tables.by_kind[True], torch.from_numpy(index * m))
        entries[m] = Entries(slots.to(device), cos.to(device), sin.to(device))
    ids_T = torch.cat([_ids(i) for i in ids]) if len(ids) else torch.empty(0, dtype=torch.int64, device=HOST)
    window_slots = _slots(group_tables["window"], owner, positions, cache.groups["window"].spec.block_rows)
    kinds = {bool(m) for m in cache.ratios}
    return Batch(
        ids=ids_T.to(device),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        start_pos=torch.from_numpy(starts.astype(np.int32)),
        positions=positions_T,
        tables=group_tables,
        window_slots=window_slots.to(device),
        rope={k: tuple(t.to(device) for t in rope.rows(tables.by_kind[k], positions_T)) for k in kinds},  # type: ignore[misc]
        entries=entries,
    )
