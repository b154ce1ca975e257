"""Decode cost of the trained nano model from 1k to 1M tokens of context: time by op, what grows and how, and transformers beside it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench import machine
from tools.bench.own import Own
from tools.bench.peer import Peer
from tools.bench.table import top_ops

MARK = "bench nano"
CONTEXTS = tuple(2**n for n in range(10, 21))
ROOM = 64
"""Tokens by which the synthetic context is shorter, so that steps fit before the model's last position."""


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares in relative error: y = start + slope x, weights 1 / y; `worst` is the largest relative error of the line.

    ValueError for fewer than 3 points: two lie on a line always.
    """
    if len(x) < 3:
        raise ValueError(f"{len(x)} points: a line needs at least 3 to be wrong")
    weights = [1 / v**2 for v in y]
    total = sum(weights)
    mx = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    my = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    spread = sum(w * (a - mx) ** 2 for w, a in zip(weights, x, strict=True))
    slope = sum(w * (a - mx) * (b - my) for w, a, b in zip(weights, x, y, strict=True)) / spread
    start = my - slope * mx
    return {"start": start, "slope": slope, "worst": max(abs(start + slope * a - b) / b for a, b in zip(x, y, strict=True))}


def growth(rows: list[dict[str, Any]], layers: list[int]) -> dict[str, Any]:
    """Seconds per entry of the indexer's and HCA's lines over context, and by how much CSA's core varies.

    csa_core: largest over smallest time at contexts with all entries chosen; csa_growth: time at the longest over the shortest of them.
    """
    tokens = [float(r["tokens"]) for r in rows]

    def of(op: str) -> list[float]:
        return [r["seconds"][op] for r in rows]

    csa = of("sparse_attention[csa]")
    found: dict[str, Any] = {"csa_core": max(csa) / min(csa), "csa_growth": csa[-1] / csa[0]}
    for op, ratio in (("index_topk[csa]", 4), ("sparse_attention[hca]", 128)):
        line = fit(tokens, of(op))
        found[op] = {**line, "ns_per_entry_and_layer": 1e9 * line["slope"] * ratio / layers.count(ratio)}
    return found


def _peer_row(peer: Peer, tokens: int, steps: int, rounds: int) -> float:
    peer.synthetic(tokens - ROOM)
    peer.step()
    seconds = [sum(peer.step() for _ in range(steps)) / steps for _ in range(rounds)]
    peer.reset()
    gc.collect()
    return statistics.median(seconds)


def run(directory: Path, contexts: Sequence[int], rounds: int, longest_step: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Report: machine, layers, rows (`tokens`, `seconds` by op and of the `step`, `transformers`: seconds of its step), growth.

    longest_step: seconds; transformers is not measured at longer contexts than the first at which its step takes longer.
    ValueError for fewer than 3 contexts, or contexts too short for the indexer to leave entries out.
    """
    own = Own(directory)
    config = own.model.config
    least = 4 * config.index_topk + ROOM
    if len(contexts) < 3 or min(contexts) < least:
        raise ValueError(f"contexts {list(contexts)}: expected at least 3, none below {least}, where the indexer has nothing to leave out")
    layers = [config.ratio(i) for i in range(config.num_hidden_layers)]
    report: dict[str, Any] = {"machine": machine.facts(), "checkpoint": str(directory), "layers": layers, "rows": []}
    for tokens in contexts:
        own.synthetic(tokens - ROOM)
        own.op_seconds(1)
        spent = own.op_seconds(rounds)
        own.reset()
        gc.collect()
        say(f"{tokens}: step {1e3 * spent['step']:.2f} ms")
        report["rows"].append({"tokens": tokens, "seconds": spent, "transformers": None})
    del own
    gc.collect()
    peer = Peer(directory)
    for row in report["rows"]:
        row["transformers"] = _peer_row(peer, row["tokens"], 4, max(2, rounds // 2))
        say(f"{row['tokens']}: transformers {1e3 * row['transformers']:.2f} ms")
        if row["transformers"] > longest_step:
            break
    return {**report, "growth": growth(report["rows"], layers)}


def markdown(report: dict[str, Any]) -> str:
    """Tables: steps beside transformers, time by op, growth."""
    m, rows, g = report["machine"], report["rows"], report["growth"]
    lines = [
        f"{m['processor']}, {m['threads']} threads, fp32, torch {m['torch']}, transformers {m['transformers']}; "
        f"load average at the start {m['load_average']:.1f}. Caches filled with random values.", "",
        f"| ms per step | {' | '.join(str(r['tokens']) for r in rows)} |", f"|---|{'---|' * len(rows)}",
    ]  # fmt: skip
    for op in ["step", *top_ops({"ops": rows})]:
        cells = [f"{1e3 * r['seconds'].get(op, 0.0):.3f}" for r in rows]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    theirs = ["-" if r["transformers"] is None else f"{1e3 * r['transformers']:.2f}" for r in rows]
    lines += [f"| transformers, step | {' | '.join(theirs)} |", ""]
    index, hca = g["index_topk[csa]"], g["sparse_attention[hca]"]
    lines.append(
        f"From {rows[0]['tokens']} to {rows[-1]['tokens']} tokens: CSA's core {g['csa_growth']:.2f}x "
        f"(largest over smallest {g['csa_core']:.2f}); the indexer "
        f"{1e6 * index['start']:.0f} us + {index['ns_per_entry_and_layer']:.2f} ns per entry and layer (line within {index['worst']:.0%}); HCA's core "
        f"{1e6 * hca['start']:.0f} us + {hca['ns_per_entry_and_layer']:.1f} ns per entry (128 tokens) and layer (within {hca['worst']:.0%})."
    )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds per step over context, both axes logarithmic: the growing ops, the flat core, both whole steps. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    tokens = [r["tokens"] for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for op in ("index_topk[csa]", "sparse_attention[csa]", "sparse_attention[hca]", "sparse_attention[swa]", "moe_mlp", "linear"):
        axes.plot(tokens, [1e3 * r["seconds"][op] for r in rows], marker="o", markersize=3, label=op)
    axes.plot(tokens, [1e3 * r["seconds"]["step"] for r in rows], color="black", linewidth=2, label="whole step")
    theirs = [(r["tokens"], 1e3 * r["transformers"]) for r in rows if r["transformers"] is not None]
    axes.plot(*zip(*theirs, strict=True), color="black", linestyle="--", label="transformers, whole step")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="context, tokens", ylabel="ms per decode step", title=f"trained nano model, {report['machine']['threads']} threads, fp32")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
