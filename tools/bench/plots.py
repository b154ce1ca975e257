"""Time of each op against context length, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.table import top_ops


def context_plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds per decode step over tokens of context, both axes logarithmic; one line per op. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [r["tokens"] for r in report["ops"]]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_prop_cycle(color=[pyplot.get_cmap("tab20")(i) for i in range(20)])
    for op in top_ops(report):
        axes.plot(tokens, [r["seconds"].get(op, 0.0) * 1e3 for r in report["ops"]], marker="o", markersize=3, label=op)
    axes.plot(tokens, [r["seconds"]["step"] * 1e3 for r in report["ops"]], color="black", linewidth=2, label="whole step")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms per decode step")
    axes.set_title(f"{report['machine']['processor']}, {report['machine']['threads']} threads, fp32")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
