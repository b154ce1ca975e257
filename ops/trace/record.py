"""The recorder: wraps the ops of every part of a model, notes each call, and keeps the tensors of the chosen ones."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ops.contract import CONTRACTS
from ops.registry import Binding, signature
from ops.trace.call import Call
from ops.trace.compact import SLOTS, TABLES, Cut, cuts
from ops.trace.lineage import Lineage


@dataclass(frozen=True)
class Selection:
    """Calls whose tensors are kept: places, ops and steps (None: all)."""

    places: frozenset[str] | None = None
    ops: frozenset[str] | None = None
    steps: range | frozenset[int] | None = None

    def __call__(self, place: str, op: str, step: int) -> bool:
        """Whether the tensors of this call are kept."""
        return (
            (self.places is None or place in self.places)
            and (self.ops is None or op in self.ops)
            and (self.steps is None or step in self.steps)
        )


NOTHING = Selection(places=frozenset())
_SMALL = 1 << 16  # bytes up to which a copy costs less than a view


class Sink(Protocol):
    """Where recorded calls go: a file, or a judge that looks at each one while the model runs."""

    def wants(self, place: str, op: str, step: int) -> bool:
        """Whether the call's tensors are to be kept."""

    def line(self, call: Call) -> None:
        """A call of which nothing is kept but shapes and checksums (caches and parameters left out); its tensors must not be held."""

    def kept(self, call: Call, parameters: Mapping[str, str]) -> None:
        """A call with its tensors. parameters: argument -> name of the model's parameter."""


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    return _bytes(t).cpu().numpy().data


def memory(t: Tensor) -> bytes | memoryview | ctypes.Array[ctypes.c_ubyte]:
    """The same bytes, to be read at once: where they lie, or a copy where that costs less."""
    if not t.is_cpu or not t.is_contiguous():
        return raw(t)
    # a run has hundreds of small tensors a step, and views of views cost more than their bytes
    size = t.nbytes
    if size <= _SMALL:
        return ctypes.string_at(t.data_ptr(), size) if size else b""
    return (ctypes.c_ubyte * size).from_address(t.data_ptr())


def checksum(t: Tensor) -> int:
    """CRC-32 of the tensor's bytes in the order of its elements."""
    return zlib.crc32(memory(t))


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


class Recorder:
    """Notes the calls of a model. Give `scope` to v4.load, then `attach` the loaded model; before that nothing is noted.

    Places are those of `Settings.scope`; steps count forward passes of the main model from 0, an MTP block's calls belong to the
    step before them.
    """

    def __init__(self) -> None:
        self.number = 0
        self.step = -1
        self._counts: dict[tuple[str, str], int] = {}
        self._alone: dict[str, str] = {}  # op -> its backend, where no shape decides
        self._sink: Sink | None = None
        self._binding: Binding | None = None
        self._parameters: dict[tuple[int, torch.Size, torch.dtype], str] = {}
        self._names = {op: tuple(signature(c).parameters) for op, c in CONTRACTS.items()}
        self._lineage = Lineage()

    def scope(self, place: str, ops: SimpleNamespace) -> SimpleNamespace:
        """The ops of one part of the model, every call of them noted."""
        return SimpleNamespace(**{op: self._wrap(place, op, fn) for op, fn in vars(ops).items()})

    def attach(self, model: nn.Module, binding: Binding, sink: Sink) -> None:
        """Pass calls on to `sink` from now on; forward passes of `model` are counted, its parameters and backends known by name."""
        self._binding, self._sink = binding, sink
        self._alone = {op: impls[0].backend for op, impls in binding.impls.items() if len(impls) == 1}
        self._parameters = {(p.data_ptr(), p.shape, p.dtype): name for name, p in model.named_parameters()}
        model.register_forward_pre_hook(self._next_step)

    def start(self, sink: Sink) -> None:
        """Record another run of the attached model: numbers, steps and counts begin anew."""
        self._sink = sink
        self.number, self.step = 0, -1
        self._counts.clear()
        self._lineage = Lineage()

    def stop(self) -> None:
        """Note nothing until the next `start`."""
        self._sink = None

    def _next_step(self, *_: Any) -> None:
        self.step += 1
        self._lineage.prune()

    def _parameter(self, value: Any) -> str | None:
        return self._parameters.get((value.data_ptr(), value.shape, value.dtype)) if isinstance(value, nn.Parameter) else None

    def _wrap(self, place: str, op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        names = self._names[op]
        caches = {cache for cache, _ in TABLES.get(op, ())} | ({SLOTS[op][0]} if op in SLOTS else set())
        key = place, op
        left_out: set[str] = set()  # caches, and arguments that are parameters at this place

        def call(*args: Any, **kwargs: Any) -> Any:
            sink, binding = self._sink, self._binding
            if sink is None or binding is None:
                return fn(*args, **kwargs)
            arguments = dict(zip(names, args, strict=False))
            arguments.update(kwargs)
            count = self._counts.get(key, 0)
            self._counts[key] = count + 1
            if not count:
                left_out.update(caches, (n for n, v in arguments.items() if self._parameter(v) is not None))
            impl = self._alone.get(op) or binding.backend_of(op, args, kwargs)
            made = Call(self.number, max(self.step, 0), place, op, count, impl, arguments)
            self.number += 1
            self._trace_back(made, left_out)
            if sink.wants(place, op, made.step):
                parameters = {n: p for n in left_out if (p := self._parameter(arguments.get(n))) is not None}
                found = self._keep(made, lambda: fn(*args, **kwargs), parameters)
                sink.kept(made, parameters)
                return found
            # results may be views of what the next op writes: looked at before anything else runs
            found = fn(*args, **kwargs)
            self._look(made, found)
            made.arguments = {k: v for k, v in arguments.items() if k not in left_out}
            sink.line(made)
            return found

        return call

    def _trace_back(self, made: Call, left_out: Iterable[str]) -> None:
        for name, value in made.arguments.items():
            if isinstance(value, Tensor) and name not in left_out:
                made.sums[name] = checksum(value)
                if link := self._lineage.of(value, made.sums[name]):
                    made.links[name] = link

    def _look(self, made: Call, found: Any) -> None:
        made.outputs = _flat(found)
        made.output_sums = [checksum(t) for t in made.outputs]
        for i, (t, total) in enumerate(zip(made.outputs, made.output_sums, strict=True)):
            self._lineage.made(t, made.number, i, total)

    def _keep(self, made: Call, run: Callable[[], Any], parameters: Mapping[str, str]) -> Any:
        given, cut = made.arguments, {c.cache: c for c in cuts(made.op, made.arguments)}
        made.arguments = _before(given, cut, parameters)
        found = run()
        self._look(made, found)
        made.outputs = [t.clone() for t in made.outputs]
        made.written = _written(made, given, cut, parameters)
        return found


def _before(given: Mapping[str, Any], cut: Mapping[str, Cut], parameters: Iterable[str]) -> dict[str, Any]:
    renumbered = {c.index: c.renumbered for c in cut.values()}
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name in renumbered:
            kept[name] = renumbered[name]
        elif name in cut:
            kept[name] = cut[name].of(value)
        else:
            kept[name] = value.clone() if isinstance(value, Tensor) and name not in parameters else value
    return kept


def _written(made: Call, given: Mapping[str, Any], cut: Mapping[str, Cut], parameters: Iterable[str]) -> dict[str, Tensor]:
    """Arguments that may be written, and those that were though they may not."""
    changed = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or name in parameters or any(name == c.index for c in cut.values()):
            continue
        now = cut[name].of(value) if name in cut else value
        if name in made.contract.mutates:
            same = False
        elif name in made.sums:
            same = checksum(now) == made.sums[name]
        else:
            same = torch.equal(_bytes(now), _bytes(made.arguments[name]))
        if not same:
            changed[name] = now if name in cut else now.clone()
    return changed
