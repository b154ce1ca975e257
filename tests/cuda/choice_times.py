"""The exact choice of 512 beside torch.topk on a device: `python -m tests.cuda.choice_times`. What is chosen is compared before it is timed."""

from __future__ import annotations

import sys

import torch

from backends.cuda_triton import choice
from tools.bench.cuda_clock import Clock

CHOSEN = 512
SIZES = ((4096, 32768), (128, 262144), (128, 32768), (128, 8192), (1, 1 << 20), (1, 262144), (1, 32768))
"""Rows and columns, all of them visible."""
_L2_BYTES = 150 << 20


def measure(clock: Clock, rows: int, columns: int) -> dict[str, float]:
    """Seconds of both, in one graph over input sets that exceed the L2. ValueError when other values are chosen."""
    device = clock.device
    sets = max(2, min(48, -(-_L2_BYTES // (4 * rows * columns)))) if clock.real else 1
    score = torch.randn(sets, rows, columns, generator=torch.Generator(device=device).manual_seed(0), device=device)
    index = torch.empty(rows, CHOSEN, dtype=torch.int32, device=device)
    cu = torch.tensor([0, rows], dtype=torch.int32, device=device)
    start = torch.tensor([columns], dtype=torch.int32, device=device)
    choice.choose(index, score[0], cu, start, 0, 1)
    best = torch.topk(score[0], CHOSEN, dim=1).values.sort(1).values
    if not torch.equal(score[0].gather(1, index.long()).sort(1).values, best):
        raise ValueError(f"{rows} x {columns}: other values are chosen than torch.topk's")
    ours = clock.replayed([lambda i=i: choice.choose(index, score[i], cu, start, 0, 1) for i in range(sets)])  # type: ignore[misc]
    theirs = clock.replayed([lambda i=i: torch.topk(score[i], CHOSEN, dim=1) for i in range(sets)])  # type: ignore[misc]
    return {"rows": rows, "columns": columns, "us": ours * 1e6, "topk_us": theirs * 1e6, "times_as_fast": theirs / ours}


def main() -> int:
    """Print a line per size; 2 without a device."""
    if not torch.cuda.is_available():
        print("choice_times: no CUDA device", file=sys.stderr)
        return 2
    clock = Clock(torch.device("cuda"), 15)
    for rows, columns in SIZES:
        print({k: round(v, 2) for k, v in measure(clock, rows, columns).items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
