"""What was called on the pretended NPU: one record per kernel launch, and counters of what makes the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """One launch. `kind`: "vendor" (a fused op) or "aten" (an op of torch). `name`: "npu::npu_rms_norm" at l2, "aclnnRmsNorm" at l3.

    `args`: argument name -> value; a tensor stands as (shape, dtype, strides).
    """

    kind: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """Launches and host waits of one stretch of a run."""

    calls: list[Call] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)

    def launches(self, kind: str | None = None) -> Counter[str]:
        """Launches by name, of one kind or of all."""
        return Counter(c.name for c in self.calls if kind is None or c.kind == kind)

    def of(self, name: str) -> list[Call]:
        """Every call of one op, in order."""
        return [c for c in self.calls if c.name == name]


_open: list[Record] = []
_meters: list[Callable[[], Counter[str]]] = []


def shown(value: Any) -> Any:
    """A value as it stands in a record."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, tuple(value.stride())
    if isinstance(value, (list, tuple)):
        return [shown(v) for v in value]
    return value


def note(kind: str, name: str, args: dict[str, Any] | None = None) -> None:
    """Add a launch to every record that is open."""
    if _open:
        call = Call(kind, name, {k: shown(v) for k, v in (args or {}).items()})
        for record in _open:
            record.calls.append(call)


def note_wait(reason: str) -> None:
    """Count an event for which the host waits for the device, with its reason."""
    for record in _open:
        record.waits[reason] += 1


def add_meter(meter: Callable[[], Counter[str]]) -> None:
    """Let records also show what `meter` counts; it returns totals since the process began."""
    _meters.append(meter)


@contextmanager
def recording() -> Iterator[Record]:
    """Record launches and host waits while the block runs. Blocks may be nested."""
    record = Record()
    before = [meter() for meter in _meters]
    _open.append(record)
    try:
        yield record
    finally:
        _open.remove(record)
        for meter, earlier in zip(_meters, before, strict=True):
            record.waits.update(meter() - earlier)
