"""Draws a training log: losses and needle accuracy over steps."""

from __future__ import annotations

import json
from pathlib import Path


def draw(log: str, out: str) -> None:
    """Write a picture of `log` (JSON lines of tools/nano/train.py) to `out`. ValueError for a log without losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    losses = [r for r in rows if "loss" in r]
    needles = [r for r in rows if "needle" in r]
    if not losses:
        raise ValueError(f"{log}: found no losses; expected the log.jsonl of a training run")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for key, label in (("loss", "next token"), ("answers", "answer tokens"), ("draft", "draft"), ("index", "index KL")):
        left.plot([r["step"] for r in losses], [r[key] for r in losses], label=label)
    left.set(xlabel="step", ylabel="nats per token", yscale="log")
    left.legend()
    for length in sorted({n for r in needles for n in r["needle"]}, key=int):
        points = [(r["step"], r["needle"][length]) for r in needles if length in r["needle"]]
        right.plot(*zip(*points, strict=True), marker="o", label=f"{length} tokens")
    right.set(xlabel="step", ylabel="needles found", ylim=(-0.02, 1.02))
    if needles:
        right.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
