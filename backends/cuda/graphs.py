"""A function of tensors replayed as a CUDA graph: one launch for a step, its inputs copied into buffers that stay where they are.

The function must read no value on the host and write only to tensors that outlive it. Calling it twice with the same inputs must do
no harm: before it is captured it runs once, so that kernels are compiled and libraries have their workspaces.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Function: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
Capture: TypeAlias = Callable[[Function, Mapping[str, Tensor]], Callable[[], Tensor]]
MOST = 8
"""Graphs kept, one per set of shapes; the one unused for longest is dropped. A step of one sequence has three."""


def capture(function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The function's launches over `buffers` as a graph; what is returned replays it and gives its result, the same tensor each time.

    RuntimeError of torch where the function waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(buffers)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Replayed:
    """`function` with the same results, captured once per set of names, shapes and types of its tensors."""

    def __init__(self, function: Function, device: torch.device, capture: Capture = capture) -> None:
        self._function, self._device, self._capture = function, device, capture
        self._held: OrderedDict[tuple[object, ...], tuple[dict[str, Tensor], Callable[[], Tensor]]] = OrderedDict()

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """The function of `given`, tensors of any device; a tensor of its own that later calls leave alone."""
        key = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(given.items()))
        if key in self._held:
            buffers, replay = self._held[key]
            for name, t in given.items():
                buffers[name].copy_(t, non_blocking=True)
        else:
            buffers = {name: t.to(self._device, copy=True) for name, t in given.items()}
            replay = self._capture(self._function, buffers)
            self._held[key] = buffers, replay
            if len(self._held) > MOST:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return replay().clone()


def replayed(function: Function, device: torch.device) -> Function:
    """What the model's runner asks a backend for: the function as graphs on `device`."""
    return Replayed(function, device)
