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
    "best of several passes over fp32 buffers of 1 GiB with the run's threads: torch.sum (read), matrix-vector product (read), "
    "copy (read and write counted); the largest is taken, measured anew before every round of steps; medians over the rounds"
)


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest wall time of `repeats` calls, after one that is not counted; seconds."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidth(gibibytes: float = 1.0, repeats: int = 5) -> dict[str, Any]:
    """Memory bandwidth in GB/s by method, and `best`, the largest of them."""
    n = int(gibibytes * 2**30) // 4
    source = torch.ones(n)
    matrix, vector = source[: n // 4096 * 4096].view(-1, 4096), torch.ones(4096)
    size = n * 4 / 1e9
    found = {
        "sum": size / best_seconds(source.sum, repeats),
        "matrix_vector": matrix.numel() * 4 / 1e9 / best_seconds(lambda: torch.mv(matrix, vector), repeats),
    }
    target = torch.empty_like(source)
    found["copy"] = 2 * size / best_seconds(lambda: target.copy_(source), repeats)
    return {**found, "best": max(found.values()), "method": METHOD}


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
