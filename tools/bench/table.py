"""The report of a run as Markdown tables."""

from __future__ import annotations

from typing import Any

MARK = "bench cpu"
SHOWN_OPS = 14


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    if p := report.get("prefill"):
        theirs = p["transformers"]
        best = min(theirs, key=theirs.__getitem__)
        mine = f"{p['v4_best']:.2f} s"
        rows.append((f"prefill {p['tokens']}, its one shot", mine, f"{theirs['one_shot']:.2f} s", f"{p['vs_one_shot']:.2f}x"))
        rows.append((f"prefill {p['tokens']}, its best ({best})", mine, f"{theirs[best]:.2f} s", f"{p['vs_best_chunking']:.2f}x"))
    for d in [report["decode"]] if "decode" in report else []:
        s = d["seconds_per_token"]
        rows.append((f"decode at {d['tokens']}", _ms(s["v4"]), _ms(s["transformers"]), f"{d['speedup']:.2f}x"))
        rows.append(("  bandwidth floor of that step", _ms(d["floor_seconds"]), "", f"{d['of_floor']:.2f} of the floor"))
    for d in report.get("long", []):
        s = d["seconds_per_token"]
        rows.append((f"decode at {d['tokens']}", _ms(s["v4"]), _ms(s["transformers"]), f"{d['speedup']:.2f}x"))
    if load := report.get("load"):
        rows.append(
            (
                "checkpoint load",
                f"{load['load_gb_per_s']:.2f} GB/s",
                f"raw {load['raw_gb_per_s']:.2f} GB/s",
                f"{load['of_raw']:.2f} of raw",
            )
        )
    return rows


def top_ops(report: dict[str, Any]) -> list[str]:
    """Op labels by their time at the longest context, most expensive first."""
    last = report["ops"][-1]["seconds"]
    return sorted((o for o in last if o != "step"), key=lambda o: -last[o])[:SHOWN_OPS]


def markdown(report: dict[str, Any]) -> str:
    """Machine, comparison table, and time of each op against context."""
    m = report["machine"]
    lines = [
        f"{m['processor']}, {m['threads']} threads, {m['capability']}, fp32, torch {m['torch']}, "
        f"transformers {m['transformers']}; load average at the start {m['load_average']:.1f}.",
        "",
        "| measurement | v4 | transformers | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in _rows(report)),
    ]
    if "decode" in report:
        b = report["decode"]["bandwidth"]
        d = report["decode"]
        low, high = (f(g["of_floor"] for g in d["groups"]) for f in (min, max))
        lines += [
            "",
            f"Bandwidth {b['best']:.1f} GB/s: {b['method']}. {d['steady']} of {len(d['groups'])} groups counted; shares of the floor "
            f"from {low:.2f} to {high:.2f} over all of them.",
        ]
    if "ops" in report:
        contexts = [r["tokens"] for r in report["ops"]]
        lines += [
            "",
            "Milliseconds per decode step by op:",
            "",
            f"| op | {' | '.join(map(str, contexts))} |",
            "|---" * (len(contexts) + 1) + "|",
        ]
        for op in (*top_ops(report), "step"):
            values = " | ".join(f"{r['seconds'].get(op, 0.0) * 1e3:.2f}" for r in report["ops"])
            lines.append(f"| {op} | {values} |")
    return "\n".join(lines) + "\n"
