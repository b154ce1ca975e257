"""A function of tensors replayed as a CUDA graph: one copy and one launch for a step, over buffers that stay where they are.

The function must read no value on the host and write only to tensors that outlive it. Calling it again with the same inputs must do
no harm: before it is captured it runs twice, so that kernels are compiled and libraries have their workspaces, and so that what needs
the host is found with its place, which a failing capture does not tell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ops.host_reads import HostReads, NotRecordable

Function: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
Capture: TypeAlias = Callable[[Function, Mapping[str, Tensor]], Callable[[], Tensor]]
MOST = 8
"""Graphs kept, one per set of shapes; the one unused for longest is dropped. A step of one sequence has three."""

_ALIGN = 16
"""Bytes that every field of a buffer starts at a multiple of: kernels are compiled for such addresses."""


def capture(function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The function's launches over `buffers` as a graph; what is returned replays it and gives its result, the same tensor each time.

    NotRecordable where the function needs the host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(buffers)
        with HostReads() as reads:
            function(buffers)
    torch.cuda.current_stream().wait_stream(side)
    if reads.places:
        raise NotRecordable(reads.places)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(buffers)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@dataclass
class _Inputs:
    """Places of the inputs of one set of shapes: those that come from the host lie in one buffer, which one copy fills."""

    host: Tensor
    device: Tensor
    written: dict[str, Tensor]
    fields: dict[str, Tensor]
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, given: Mapping[str, Tensor], device: torch.device) -> _Inputs:
        """Places for tensors like those given."""
        places, size = {}, 0
        for name, t in given.items():
            if t.device.type == "cpu":
                places[name] = size
                size += -(-t.nbytes // _ALIGN) * _ALIGN
        real = device.type == "cuda"
        host = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=real)
        there = torch.zeros(size, dtype=torch.uint8, device=device)

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {n: buffer[at : at + given[n].nbytes].view(given[n].dtype).view(given[n].shape) for n, at in places.items()}

        rest = {name: torch.empty_like(t, device=device) for name, t in given.items() if name not in places}
        return cls(host, there, {**views(host), **rest}, {**views(there), **rest}, torch.cuda.Event() if real else None)

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Put values there. The copy is not waited for; the host buffer is written again only once the last copy has left it."""
        if self.copied is not None:
            self.copied.synchronize()
        for name, t in given.items():
            self.written[name].copy_(t, non_blocking=True)
        self.device.copy_(self.host, non_blocking=True)
        if self.copied is not None:
            self.copied.record()


class Replayed:
    """`function` with the same results, captured once per set of names, shapes and types of its tensors."""

    def __init__(self, function: Function, device: torch.device, capture: Capture = capture) -> None:
        self._function, self._device, self._capture = function, device, capture
        self._held: OrderedDict[tuple[object, ...], tuple[_Inputs, Callable[[], Tensor]]] = OrderedDict()

    @property
    def held(self) -> int:
        """Graphs kept."""
        return len(self._held)

    def replays(self) -> list[Callable[[], Tensor]]:
        """Replays of the graphs kept, over the inputs they were last given: for timing."""
        return [replay for _, replay in self._held.values()]

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """The function of `given`, tensors of the host or the device; a tensor of its own that later calls leave alone."""
        key = tuple((name, tuple(t.shape), t.dtype, t.device.type) for name, t in sorted(given.items()))
        if key in self._held:
            inputs, replay = self._held[key]
            inputs.fill(given)
        else:
            inputs = _Inputs.of(given, self._device)
            inputs.fill(given)
            replay = self._capture(self._function, inputs.fields)
            self._held[key] = inputs, replay
            if len(self._held) > MOST:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return replay().clone()


def replayed(function: Function, device: torch.device) -> Function:
    """What the model's runner asks a backend for: the function as graphs on `device`."""
    return Replayed(function, device)
