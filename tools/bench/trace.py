"""What recording costs: the run of `make demo` with and without a trace, taking turns, and the size of the trace."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ops.trace import NOTHING, Recorder, Selection, Writer
from tools import generate
from tools.cli import parser
from tools.trace.record import header_of
from v4.config import Config

MARK = "cost of a trace"
LAYER = 2
"""The layer whose tensors are kept: the first CSA layer of the demo's model."""
KINDS: Mapping[str, Selection] = {
    "checksums only": NOTHING,
    f"tensors of layer {LAYER}": Selection(places=frozenset({f"layers.{LAYER}"})),
    "tensors of every layer, first two steps": Selection(steps=frozenset({0, 1})),
}


def measure(model: Path, prompt: str, tokens: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of the untraced run and of each kind of trace (medians over `rounds`, ratios within a round), calls and bytes.

    Loading is not counted; the traces are written to a temporary folder and closed within the time taken.
    """
    request = generate.prepare(parser().parse_args(["generate", "--model", str(model), "--max-new-tokens", str(tokens), prompt]))
    config = Config.from_file(model)
    plain, recorder = generate.load(request), Recorder()
    traced = generate.load(request, recorder.scope)
    attached = False

    def untraced() -> float:
        began = time.perf_counter()
        generate.answer(request, plain, lambda piece: None)
        return time.perf_counter() - began

    def once(selection: Selection, folder: Path) -> tuple[float, dict[str, Any]]:
        nonlocal attached
        began = time.perf_counter()
        writer = Writer(folder, header_of(request, config), selection=selection, limit=2**30)
        if attached:
            recorder.start(writer)
        else:
            recorder.attach(traced.runner.model, traced.binding, writer)
            attached = True
        report = generate.answer(request, traced, lambda piece: None)
        end = writer.close(tokens=report["tokens"])
        return time.perf_counter() - began, end

    untraced()
    seconds: dict[str, list[float]] = {kind: [] for kind in ("untraced", *KINDS)}
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        seconds["untraced"].append(untraced())
        for kind, selection in KINDS.items():
            with tempfile.TemporaryDirectory(prefix="v4-trace-") as scratch:
                taken, end = once(selection, Path(scratch) / "trace")
                size = sum(f.stat().st_size for f in (Path(scratch) / "trace").iterdir())
            seconds[kind].append(taken)
            found[kind] = {"calls": end["calls"], "kept": end["kept"], "bytes": size}
        say(f"trace, round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))
    rows = {
        kind: {
            **found[kind],
            "seconds": statistics.median(seconds[kind]),
            "ratio": statistics.median(t / p for t, p in zip(seconds[kind], seconds["untraced"], strict=True)),
        }
        for kind in KINDS
    }
    return {
        "model": str(model),
        "tokens": tokens,
        "rounds": rounds,
        "untraced_seconds": statistics.median(seconds["untraced"]),
        "traces": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table for docs/parity.md."""
    lines = ["| trace | calls | with tensors | size | time beside the untraced run |", "|---|---|---|---|---|"]
    for kind, row in report["traces"].items():
        lines.append(f"| {kind} | {row['calls']} | {row['kept']} | {row['bytes'] / 1e6:.1f} MB | {row['ratio']:.2f}x |")
    return "\n".join(lines)
