"""Timing on the device: events around replayed graphs; and the ceilings that a share of the floor refers to.

Without a device (dry run) the same calls are timed by the wall clock, so that every path is walked; such figures mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass
class Clock:
    """Seconds of calls on `device`. `rounds`: how often a measurement is repeated; medians are reported."""

    device: torch.device
    rounds: int = 20
    _cold: Tensor | None = field(default=None, repr=False)

    @property
    def real(self) -> bool:
        """Whether there is a device to time."""
        return self.device.type == "cuda"

    def _between(self, work: Call, before: Call, rounds: int | None = None) -> float:
        """Median seconds of `work`, with `before` run in front of each time and not counted."""
        times = []
        for _ in range(rounds or self.rounds):
            before()
            if self.real:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                work()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last) / 1e3)
            else:
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _flush(self) -> None:
        # 256 MB written: more than the L2 of a Hopper chip holds
        if self._cold is None:
            self._cold = torch.empty((256 << 20) if self.real else 1, dtype=torch.uint8, device=self.device)
        self._cold.zero_()

    def _graph(self, calls: Sequence[Call]) -> Call:
        def all_of_them() -> None:
            for call in calls:
                call()

        all_of_them()
        if not self.real:
            return all_of_them
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            all_of_them()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        return graph.replay

    def replayed(self, calls: Sequence[Call]) -> float:
        """Seconds per call of `calls`, captured one behind the other in one graph; use as many input sets as exceed the L2."""
        replay = self._graph(calls)
        replay()
        return self._between(replay, lambda: None) / len(calls)

    def cold(self, call: Call) -> float:
        """Seconds of one call in a graph with nothing of its inputs left in the L2."""
        replay = self._graph([call])
        return self._between(replay, self._flush)

    def between(self, call: Call) -> float:
        """Seconds of a call that launches by itself what it waits for, a replay say."""
        return self._between(call, lambda: None)

    def eager(self, call: Call) -> float:
        """Seconds of one call made from Python, what the host needs for launching it included; a call of over 0.2 s runs twice only."""
        self._between(call, self._flush, 1)
        once = self._between(call, self._flush, 1)
        return once if once > 0.2 else self._between(call, self._flush, 5)


def _matmul(clock: Clock, n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / clock.replayed([lambda: a @ b])


def _fp8(clock: Clock, n: int) -> float:
    a, b = (torch.randn(n, n, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)
    return 2 * n**3 / clock.replayed([lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)])


def ceilings(clock: Clock) -> dict[str, float]:
    """Bytes per second read and written by the fastest plain kernel, operations per second of products by type, seconds of one small kernel of a graph."""
    real = clock.real
    source = torch.randn((1 << 28) if real else 64, device=clock.device)
    target = torch.empty_like(source)
    # the driver's copy is not the fastest way to read and write: kernels can be faster, and a share above 1 would say nothing
    ways = (lambda: target.copy_(source), lambda: torch.mul(source, 2.0, out=target))
    found = {"bytes": 2 * source.numel() * 4 / min(clock.replayed([way]) for way in ways)}
    n = 8192 if real else 16
    found["bf16"] = _matmul(clock, n, torch.bfloat16)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = _matmul(clock, n, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = before
    found["fp8"] = _fp8(clock, n) if real else found["bf16"]
    small = torch.zeros(16, device=clock.device)
    found["launch"] = clock.replayed([lambda: small.add_(1)] * 50)
    return found
