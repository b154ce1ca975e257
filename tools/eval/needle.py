"""Needle accuracy by context length and depth: each trial is generated greedily from the prompt to the end of the answer."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from tools.eval.model import Subject, interval, open_model, settings
from tools.nano.batches import Encoder
from tools.nano.needle import prompt

CHUNK = 2048


def lengths_of(text: str) -> list[int]:
    """The lengths of "512,1024". ValueError for anything but integers of at least 128."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--lengths: found {text!r}, expected integers such as 512,4096") from None
    if min(found) < 128:
        raise ValueError(f"--lengths: found {min(found)}, expected at least 128")
    return found


def trial(subject: Subject, encoder: Encoder, seed: int, length: int, depth: float, number: int) -> bool:
    """Whether the model says the planted answer."""
    case = prompt(Random(f"needle:{seed}:{length}:{number}"), encoder, length, depth)
    wanted = f"{case.lead}{case.text}."
    result = subject.model.generate(case.ids, len(encoder(wanted)) + 4, chunk=CHUNK)
    return subject.tokenizer.decode(result.tokens, skip_special=True).strip() == wanted


def _row(subject: Subject, encoder: Encoder, args: argparse.Namespace, length: int, bar: tqdm) -> dict[str, Any]:
    by_depth = [{"depth": (d + 0.5) / args.depths, "trials": 0, "right": 0} for d in range(args.depths)]
    began = time.perf_counter()
    right = 0
    for n in range(args.trials):
        at = by_depth[n % args.depths]
        found = trial(subject, encoder, args.seed, length, at["depth"], n)
        at["trials"] += 1
        at["right"] += found
        right += found
        bar.update(length)
        bar.set_postfix_str(f"{length} tokens: {right}/{n + 1}")
    low, high = interval(right, args.trials)
    seconds = time.perf_counter() - began
    return {
        "length": length, "trials": args.trials, "right": right, "accuracy": right / args.trials, "low": low, "high": high,
        "by_depth": [d for d in by_depth if d["trials"]], "tokens_per_second": length * args.trials / seconds,
    }  # fmt: skip


def report(args: argparse.Namespace) -> dict[str, Any]:
    """The settings and one row by length: accuracy with its 95 % interval, and right answers by depth. ValueError for wrong options.

    Long contexts take long: each length is told on stderr, and saved with those before it, as soon as it is done.
    """
    lengths = lengths_of(args.lengths)
    if args.depths < 1:
        raise ValueError(f"--depths {args.depths}: expected at least 1")
    subject = open_model(args)
    if (most := max(lengths) + 32) > subject.model.max_context:
        raise ValueError(f"--lengths: {most} tokens with the answer, the model takes {subject.model.max_context}")
    encoder = Encoder(subject.tokenizer)
    with tqdm(total=sum(lengths) * args.trials, unit="tok", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        rows: list[dict[str, Any]] = []
        head = {**settings(args), "window": subject.model.config.sliding_window}
        for length in lengths:
            rows.append(_row(subject, encoder, args, length, bar))
            if length != lengths[-1]:
                bar.write(_line(rows[-1]), file=sys.stderr)
                if args.save:
                    Path(args.save).write_text(json.dumps({**head, "complete": False, "lengths": rows}, indent=1) + "\n", encoding="utf-8")
    subject.check()
    return {**head, "complete": True, "lengths": rows}


def _line(row: dict[str, Any]) -> str:
    depths = " ".join(f"{100 * d['right'] / d['trials']:.0f}" for d in row["by_depth"])
    return f"{row['length']:>8d}{row['trials']:>8d}{row['accuracy']:>9.1%}   {row['low']:.1%} to {row['high']:.1%}   {depths}"


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'tokens':>8s}{'trials':>8s}{'found':>9s}   95 % interval   by depth"]
    return "\n".join([*lines, *map(_line, found["lengths"])])


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Heat map of accuracy: lengths across, depths down. rows: `lengths` of one or more reports with the same number of depths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(rows, key=lambda r: r["length"])
    shares = [[d["right"] / d["trials"] for d in row["by_depth"]] for row in rows]
    figure, axes = plt.subplots(figsize=(1.5 + 0.9 * len(rows), 4.2))
    image = axes.imshow(list(zip(*shares, strict=True)), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(rows)), [f"{r['length']}\n{r['accuracy']:.1%}\nof {r['trials']}" for r in rows])
    axes.set_yticks(range(len(rows[0]["by_depth"])), [f"{d['depth']:.2f}" for d in rows[0]["by_depth"]])
    axes.set(xlabel="context in tokens, needles found, trials", ylabel="depth (0: start)", title="needles found")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
