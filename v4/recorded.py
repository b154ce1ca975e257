"""Single steps that are recorded once and replayed: the same kernels over tensors that stay where they are.

What changes from step to step (ids, positions, block tables, slots, rotary rows) goes through one host buffer into one device
buffer, so that a step is one copy and one replay. How a step is recorded is the backend's affair (`Recorder`).
Shapes: B sequences of one new token each, V vocabulary, E entries completed by the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from v4 import batch as batches
from v4.batch import Batch, Entries
from v4.cache import HOST, Cache, Sequence
from v4.runner import Runner

_ALIGN = 16
"""Bytes that every field of the buffer starts at a multiple of: kernels compile for such addresses."""


class Recorder(Protocol):
    """What a backend offers that can replay work."""

    def staging(self, size: int) -> Tensor:
        """A host buffer uint8 [size] that `upload` copies from."""

    def settled(self) -> None:
        """Return once every upload so far has left its host buffer, which may then be written again."""

    def upload(self, host: Tensor, device: Tensor) -> None:
        """Copy a staging buffer to the device, in order with the replays."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record `work` and return what replays it; a replay returns the same tensor every time, with new values.

        `work` may run any number of times meanwhile. Raises ops.host_reads.NotRecordable with the places that need the host.
        """


def _fields(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with a name."""
    for name in ("ids", "cu_seqlens", "start_pos", "positions", "window_slots"):
        yield name, getattr(batch, name)
    for group, table in batch.tables.items():
        yield f"tables.{group}", table
    for kind, (cos, sin) in batch.rope.items():
        yield f"rope.{kind}.cos", cos
        yield f"rope.{kind}.sin", sin
    for m, e in batch.entries.items():
        for name in ("slots", "cos", "sin"):
            yield f"entries.{m}.{name}", getattr(e, name)


def _with(batch: Batch, fields: dict[str, Tensor]) -> Batch:
    """The batch with other tensors under the same names."""
    return Batch(
        ids=fields["ids"],
        cu_seqlens=fields["cu_seqlens"],
        start_pos=fields["start_pos"],
        positions=fields["positions"],
        tables={group: fields[f"tables.{group}"] for group in batch.tables},
        window_slots=fields["window_slots"],
        rope={kind: (fields[f"rope.{kind}.cos"], fields[f"rope.{kind}.sin"]) for kind in batch.rope},
        entries={m: Entries(*(fields[f"entries.{m}.{part}"] for part in ("slots", "cos", "sin"))) for m in batch.entries},
    )


def _padded(made: Entries, rows: int) -> Entries:
    """None or `rows` entries, so that steps of several sequences have few shapes; what is added is not stored (slot -1)."""
    missing = rows - made.slots.shape[0]
    if missing in (0, rows):
        return made
    pairs = made.cos.shape[1]
    return Entries(
        torch.cat([made.slots, made.slots.new_full((missing,), -1)]),
        torch.cat([made.cos, made.cos.new_ones(missing, pairs)]),
        torch.cat([made.sin, made.sin.new_zeros(missing, pairs)]),
    )


@dataclass(frozen=True)
class _Recorded:
    """One shape of a step: its buffers, views of the host buffer by field, the batch over the device buffer, and its replay."""

    host: Tensor
    device: Tensor
    views: dict[str, Tensor]
    batch: Batch
    replay: Callable[[], Tensor] | None = None


def _buffers(batch: Batch, recorder: Recorder, device: torch.device) -> _Recorded:
    places: dict[str, tuple[int, Tensor]] = {}
    size = 0
    for name, value in _fields(batch):
        places[name] = (size, value)
        size += -(-value.nbytes // _ALIGN) * _ALIGN
    host, there = recorder.staging(size), torch.zeros(size, dtype=torch.uint8, device=device)

    def views(buffer: Tensor) -> dict[str, Tensor]:
        return {n: buffer[at : at + v.nbytes].view(v.dtype).view(v.shape) for n, (at, v) in places.items()}

    return _Recorded(host, there, views(host), _with(batch, views(there)))


class RecordedSteps:
    """Steps of sequences in one cache, one token each: recorded when a shape comes for the first time, replayed from then on.

    The shapes of B sequences differ by which ratios complete entries, at most four in all. The cache and the model's parameters must
    stay where they are. The logits that a call returns are overwritten by the next one.
    """

    def __init__(self, runner: Runner, cache: Cache, recorder: Recorder) -> None:
        self._runner, self._cache, self._recorder = runner, cache, recorder
        self._by_shape: dict[tuple[tuple[str, torch.Size], ...], _Recorded] = {}

    @property
    def shapes(self) -> int:
        """Shapes recorded so far."""
        return len(self._by_shape)

    @torch.inference_mode()
    def __call__(self, sequences: Seq[Sequence], tokens: Seq[int]) -> Tensor:
        """Store `tokens[b]` as the next token of `sequences[b]`; logits fp32 [B, V] of the tokens after them.

        Raises what `batch.build` raises, and NotRecordable when the step needs the host.
        """
        layout = batches.build(self._cache, self._runner.tables, sequences, [[token] for token in tokens], HOST)
        layout = _with(layout, dict(_fields(layout)) | self._padding(layout, len(sequences)))
        shape = tuple((name, value.shape) for name, value in _fields(layout))
        held = self._by_shape.get(shape) or _buffers(layout, self._recorder, self._runner.device)
        self._recorder.settled()
        for name, value in _fields(layout):
            held.views[name].copy_(value)
        self._recorder.upload(held.host, held.device)
        if held.replay is None:
            held = self._by_shape[shape] = self._record(held)
        assert held.replay is not None
        logits = held.replay()
        for sequence in sequences:
            sequence.advance(1)
        return logits

    @staticmethod
    def _padding(layout: Batch, rows: int) -> dict[str, Tensor]:
        padded = {m: _padded(made, rows) for m, made in layout.entries.items()}
        return {f"entries.{m}.{part}": getattr(e, part) for m, e in padded.items() for part in ("slots", "cos", "sin")}

    def _record(self, held: _Recorded) -> _Recorded:
        model, cache = self._runner.model, self._cache

        def work() -> Tensor:
            return model.logits(model(held.batch, cache))

        return _Recorded(held.host, held.device, held.views, held.batch, self._recorder.record(work))
