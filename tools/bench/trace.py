"""What recording costs: the run of `make demo` with and without a trace, taking turns, and the size of the trace.

Measured twice: the command as a user types it, from start to end, and the generation alone, within one process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
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
_OPTIONS = dict(zip(KINDS, (["--no-tensors"], ["--places", str(LAYER)], ["--steps", "0,1"]), strict=True))


def commands(model: Path, prompt: str, tokens: int, rounds: int, say: Callable[[str], None]) -> dict[str, float]:
    """Per kind of trace, seconds of `v4 trace record` over those of `v4 generate`, whole commands: the median over rounds.

    subprocess.CalledProcessError when a command fails.
    """
    run = ["--model", str(model), "--max-new-tokens", str(tokens), prompt]

    def seconds(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tools.cli", *words, *run], check=True, capture_output=True)
        return time.perf_counter() - began

    seconds("generate")
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        plain = seconds("generate")
        for kind, options in _OPTIONS.items():
            with tempfile.TemporaryDirectory(prefix="v4-trace-") as scratch:
                ratios[kind].append(seconds("trace", "record", "--out", f"{scratch}/trace", *options) / plain)
        say(
            f"commands, round {number + 1} of {rounds}: untraced {plain:.2f} s, "
            + ", ".join(f"{k} {v[-1]:.2f}x" for k, v in ratios.items())
        )
    return {kind: statistics.median(found) for kind, found in ratios.items()}


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
    whole = commands(model, prompt, tokens, rounds, say)
    rows = {
        kind: {
            **found[kind],
            "command_ratio": whole[kind],
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
    lines = ["| trace | calls | with tensors | size | whole command | generation alone |", "|---|---|---|---|---|---|"]
    for kind, row in report["traces"].items():
        lines.append(
            f"| {kind} | {row['calls']} | {row['kept']} | {row['bytes'] / 1e6:.1f} MB | {row['command_ratio']:.2f}x | {row['ratio']:.2f}x |"
        )
    return "\n".join(lines)
