"""The report of the CUDA bench as Markdown."""

from __future__ import annotations

from typing import Any

MARK = "bench cuda"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _times(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / row['seconds']:.2f}" if key in row else "-"


def markdown(report: dict[str, Any]) -> str:
    """Ceilings, then a row per case: microseconds, floor, share, and how much longer torch takes."""
    c = report["ceilings"]
    rates = ", ".join(f"{k} {c[k] / 1e12:.0f} TFLOP/s" for k in ("bf16", "tf32", "fp8"))
    lines = [
        f"{report['device']}, torch {report['torch']}; measured in the same run: reading and writing {c['bytes'] / 1e12:.2f} TB/s, {rates}, "
        f"{c['launch'] * 1e6:.2f} us per small kernel of a graph.",
        "",
        "| case | us | floor us | bound | share of floor | torch eager / ours | torch.compile / ours | error/bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['case']} | {_us(r['seconds'])} | {_us(r['floor_seconds'])} | {r['binds']} | {r['share']:.2f} | "
            f"{_times(r, 'eager_seconds')} | {_times(r, 'compiled_seconds')} | {r['worst_error_over_bound']:.2f} |"
        )
    lines += [f"\nFAILED {f['case']}: {f['error']}" for f in report["failed"]]
    if report.get("not_run"):
        lines.append(f"\nNot run, the time given was over: {', '.join(report['not_run'])}.")
    return "\n".join(lines) + "\n"
