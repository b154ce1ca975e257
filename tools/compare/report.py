"""The comparison for people (a table, prompts that depart earliest first) and for machines (one JSON object, also as a file)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.compare.measure import Result, summary


def as_dict(head: dict[str, Any], results: Sequence[Result], stopped: str | None) -> dict[str, Any]:
    """{model, endpoint, ... of `head`, prompts, summary, stopped}; `stopped`: why not all prompts were compared, or None."""
    return {**head, "prompts": [r.to_dict() for r in results], "summary": summary(results, stopped is None), "stopped": stopped}


def check_out(out: Path | None, overwrite: bool) -> None:
    """ValueError when the report could not be written to `out`, or would replace a file without `overwrite`."""
    if out is None:
        return
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out} is {'a directory' if out.is_dir() else 'in no directory'}; give the path of a file")
    if out.exists() and not overwrite:
        raise ValueError(f"--out: {out} exists; give another name, or --overwrite to replace it")


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the report to `out`, whole or not at all: what an interrupted run leaves is the report of before. ValueError when it
    can not be written."""
    part = out.with_name(f"{out.name}.part")
    data = json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        part.write_text(data, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(f"--out: {out} can not be written: {error.strerror}") from None


NOTHING = "the server gave no token's log-probability; try a larger --top-logprobs, a smaller --stride, or other prompts"
"""What to do when no token could be compared."""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown(token: str) -> str:
    text = json.dumps(token, ensure_ascii=False)
    return text if len(text) <= 24 else text[:21] + '..."'


def _row(r: Result) -> str:
    noise = "" if r.noise_max is None else f"{r.noise_max:>8.3f}"
    return (
        f"{r.id[:20]:<20s} {_number(r.begins, 'd'):>7s} {r.compared:>7,}/{r.tokens:<7,} {_number(r.mean_abs, '.4f'):>9s} "
        f"{_number(r.worst, '+.3f'):>9s} {_number(r.worst_position, 'd'):>7s} "
        f"{f'{r.top1_disagreements}/{r.top1_compared}':>10s} {_number(r.kl_mean, '.4f'):>9s}{noise}"
    )


def _reasons(r: Result) -> list[str]:
    lines = []
    if r.tokenisation:
        t = r.tokenisation
        lines.append(
            f"token {t['position']}: the server reads {_shown(t['theirs'])} where we read {_shown(t['ours'])}; "
            f"{r.unaligned} tokens from there on are not compared"
        )
    if r.first is not None:
        theirs = "not finite" if r.first_theirs is None else f"{r.first_theirs:.3f}"
        lines.append(f"token {r.first} {_shown(r.first_token or '')}: ours {_number(r.first_ours, '.3f')}, theirs {theirs}")
    if r.top1_first is not None:
        lines.append(f"token {r.top1_first}: the likeliest token is another one")
    if r.missing_first is not None:
        lines.append(
            f"token {r.missing_first}: null for its log-probability, as for {r.missing} in all; servers write it for NaN"
        )
    elif r.missing:
        lines.append(f"{r.missing} tokens not asked for, or not among the likeliest that the server returned")
    if r.not_finite:
        lines.append(f"{r.not_finite} tokens with a log-probability that is not finite")
    return [f"    {line}" for line in lines]


def text(report: dict[str, Any], results: Sequence[Result]) -> str:
    """The table, sorted by where differences begin, what begins there, and the totals."""
    s, threshold, window = report["summary"], report["threshold"], report["sliding_window"]
    noise = "" if s["noise_max"] is None else f"{'noise':>8s}"
    lines = [
        f"{report['endpoint']} ({report['name']}) against {report['model']} "
        f"({report['backend']}, {report['dtype']}, {report['numerics']}); asked by {report['way']}",
        f"{'prompt':<20s} {'begins':>7s} {'compared':>15s} {'mean':>9s} {'worst':>9s} {'at':>7s} {'top-1 off':>10s} {'KL':>9s}{noise}",
    ]
    for r in sorted(results, key=lambda r: (r.begins is None, r.begins)):
        lines += [_row(r), *_reasons(r)]
    worst = "nothing was compared" if s["worst"] is None else f"largest difference {s['worst']:+.3f}, mean {s['mean_abs']:.4f}"
    lines += ["", f"{s['compared']:,} of {s['tokens']:,} tokens in {s['prompts']} prompts compared; {worst} (nat)"]
    if s["departing"]:
        lines.append(f"{s['departing']} prompts depart (threshold {threshold:g}), the earliest at token {s['earliest']}")
        if s["earliest"] >= window:
            lines.append(
                f"none departs within the sliding window of {window} tokens: look at compressed entries and their positions"
            )
    elif s["within"]:
        lines.append(f"within the threshold of {threshold:g}")
    else:
        lines.append("no verdict: " + ("not all prompts were compared" if report["stopped"] else NOTHING))
    if s["noise_max"] is not None:
        lines.append(
            f"yardstick: our {report['dtype']} and {report['yardstick']} differ by {s['noise_max']:.3f} at most, "
            f"{s['noise_mean']:.4f} on average"
        )
        if s["noise_max"] > threshold:
            lines.append("the threshold lies below this noise: what it finds may be rounding; raise --threshold")
    if report["stopped"]:
        lines.append(f"stopped: {report['stopped']}")
    return "\n".join(lines)
