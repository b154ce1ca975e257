"""Loading a checkpoint, or reading it raw, once, in a process of its own: `python -m tools.bench.reading DIRECTORY load|raw` prints seconds.

Memory that a process has used and freed is read into without page faults, which only a reader that keeps no pages of its own gains from: a second
reading in the same process says nothing about the first, which is the one that users wait for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch


def once(directory: Path, way: str) -> dict[str, float]:
    """Seconds of one reading in this process. way: `load` (v4.load, in `parameters` the part that fills them) or `raw`. ValueError for another."""
    if way == "raw":
        from v4.load import raw_read_gb_per_s

        began = time.perf_counter()
        raw_read_gb_per_s(directory)
        return {"seconds": time.perf_counter() - began}
    if way != "load":
        raise ValueError(f"found {way!r}, expected load or raw")
    import v4

    began = time.perf_counter()
    model = v4.load(directory, backend="cpu", dtype=torch.float32, numerics="exact")
    return {"seconds": time.perf_counter() - began, "parameters": model.report.seconds}


def apart(directory: Path, way: str) -> dict[str, float]:
    """`once` in a new process. ValueError with its message when that fails."""
    command = [sys.executable, "-m", "tools.bench.reading", str(directory.resolve()), way]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(once(Path(sys.argv[1]), sys.argv[2])))
