"""Steps as CUDA graphs: recorded once, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.host_reads import HostReads, NotRecordable


class Recorder:
    """Graphs that share one memory pool: they are replayed one at a time, and a result is used before the next replay.

    The work runs twice before it is captured: once so that kernels are compiled and tables are made, once watched for anything that
    needs the host, which capture would refuse with an error that names no place.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._copied = torch.cuda.Event()

    def staging(self, size: int) -> Tensor:
        """Pinned host memory uint8 [size]."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def settled(self) -> None:
        """Wait for the last upload; it is long done where the result of a step was read."""
        self._copied.synchronize()

    def upload(self, host: Tensor, device: Tensor) -> None:
        """Copy without waiting, on the current stream."""
        device.copy_(host, non_blocking=True)
        self._copied.record()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture `work`; the function that replays it returns the captured result. NotRecordable names what needs the host."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
            with HostReads() as reads:
                work()
        torch.cuda.current_stream().wait_stream(side)
        if reads.places:
            raise NotRecordable(reads.places)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
