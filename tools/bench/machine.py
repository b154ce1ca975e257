"""Facts of the machine that a measurement depends on, and the memory bandwidth that decoding is held against."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

METHOD = (
    "one pass each of torch.sum (read) and copy (read and write counted) over fp32 buffers of 1 GiB with the run's threads, the faster of the two; "
    "taken before and after every group of steps, and groups between unlike bandwidths left out; medians over the groups"
)


class Meter:
    """Memory bandwidth at this moment. Shared machines change it within seconds, so a measurement needs it close by."""

    def __init__(self, gibibytes: float = 1.0) -> None:
        self.source = torch.ones(int(gibibytes * 2**30) // 4)
        self.target = torch.empty_like(self.source)
        self.now()

    def now(self) -> float:
        """GB/s: the faster of one pass of reading and one of copying (both directions counted)."""
        size = self.source.numel() * 4 / 1e9
        return max(size / seconds(self.source.sum), 2 * size / seconds(lambda: self.target.copy_(self.source)))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()


def facts() -> dict[str, Any]:
    """Processor, cores, threads in use, load at the start, and versions."""
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
