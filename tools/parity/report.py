"""What a parity run found, as JSON, as text and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections import defaultdict
from importlib.resources import files
from typing import Any

from tools.parity.cases import Case, Outcome
from tools.parity.gaps import Gap
from tools.parity.mutation import Mutation

_EDGES = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Lower ends of the classes of error / bound; the last class is above the bound."""


def by_op(outcome: Outcome, mutation: Mutation) -> dict[str, dict[str, Any]]:
    """Per op: cases, failures, worst error/bound, counts by class of error/bound, mutants and legal cases."""
    grouped: dict[str, list[Case]] = defaultdict(list)
    for case in outcome.cases:
        grouped[case.where.op].append(case)
    found = {}
    for op, cases in sorted(grouped.items()):
        counts = [0] * len(_EDGES)
        for c in cases:
            counts[max(i for i, edge in enumerate(_EDGES) if c.worst > edge or i == 0)] += 1
        finite = [c.worst for c in cases if math.isfinite(c.worst)]
        found[op] = {
            "cases": len(cases),
            "failures": sum(not c.ok for c in cases),
            "worst": max(finite, default=None),
            "classes": counts,
            "survivors": [s for s in mutation.survivors if s.startswith(f"{op}:")],
            **mutation.of_op(op),
        }
    return found


def as_json(
    outcome: Outcome, mutation: Mutation, new: list[Any], unused: list[Gap], header: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """The machine form; its keys are documented in docs/parity.md."""
    return {
        "cases": len(outcome.cases),
        "failures": [c.as_dict() for c in outcome.failures],
        "holes": [{**vars(w), "reason": reason, "known": w not in new} for w, reason in outcome.holes.items()],
        "unused_gaps": [str(g) for g in unused],
        "mutants_total": mutation.total,
        "mutants_killed": mutation.killed,
        "false_alarms": len(mutation.false_alarms),
        "mutation": mutation.as_dict(),
        "by_op": by_op(outcome, mutation),
        "problems": problems,
        "ok": not problems,
        **header,
    }


def text(found: dict[str, Any]) -> str:
    """The report for people: a line per op, then what is wrong and how to repeat it."""
    lines = [f"{'op':<22} {'cases':>7} {'wrong':>6}  worst error/bound"]
    for op, row in found["by_op"].items():
        worst = "-" if row["worst"] is None else f"{row['worst']:.3f}"
        lines.append(f"{op:<22} {row['cases']:>7} {row['failures']:>6}  {worst}")
    lines.append(f"{'all':<22} {found['cases']:>7} {len(found['failures']):>6}")
    if found["mutants_total"]:
        lines.append(
            f"mutants rejected: {found['mutants_killed']} of {found['mutants_total']}; legal cases rejected: "
            f"{found['false_alarms']} of {found['mutation']['legal_cases']}"
        )
    known = sum(h["known"] for h in found["holes"])
    lines.append(f"holes of the coverage: {len(found['holes'])}, {known} of them known")
    for case in found["failures"][:20]:
        lines += [f"WRONG {case['op']} on {case['backend']}, {case['dtype']}: {p}" for p in case["problems"]]
        lines.append(f"  repeat: {case['repeat']}")
    if len(found["failures"]) > 20:
        lines.append(f"  and {len(found['failures']) - 20} more wrong cases (--json lists all)")
    return "\n".join(lines + [f"FAIL {p}" for p in found["problems"]])


def markdown(found: dict[str, Any]) -> str:
    """Counts by op for docs/parity.md."""
    lines = [
        "| op | cases | wrong | largest error/bound | mutants rejected | legal cases rejected |",
        "|---|---|---|---|---|---|",
    ]
    for op, row in found["by_op"].items():
        worst = "-" if row["worst"] is None else f"{row['worst']:.3f}"
        mutants = f"{row['mutants_killed']} of {row['mutants_total']}" if row["mutants_total"] else "-"
        legal = f"{row['false_alarms']} of {row['legal_cases']}" if row["legal_cases"] else "-"
        lines.append(f"| {op} | {row['cases']} | {row['failures']} | {worst} | {mutants} | {legal} |")
    lines.append(
        f"| all | {found['cases']} | {len(found['failures'])} | | {found['mutants_killed']} of {found['mutants_total']} | "
        f"{found['false_alarms']} of {found['mutation']['legal_cases']} |"
    )
    lines.append(f"\n{found['machine']}; seed {found['seed']}.")
    return "\n".join(lines)


def html(found: dict[str, Any], outcome: Outcome) -> str:
    """One page without outside parts: the coverage matrix, the distribution of error/bound per op, worst cases, survivors."""
    from jinja2 import Environment, StrictUndefined

    columns = sorted({(c.where.backend, c.where.dtype, c.where.soc or "") for c in outcome.cases}
                     | {(w.backend, w.dtype, w.soc or "") for w in outcome.holes})  # fmt: skip
    cells: dict[tuple[str, tuple[str, str, str]], dict[str, Any]] = {}
    for c in outcome.cases:
        cell = cells.setdefault(
            (c.where.op, (c.where.backend, c.where.dtype, c.where.soc or "")), {"cases": 0, "wrong": 0, "worst": 0.0}
        )
        cell["cases"] += 1
        cell["wrong"] += not c.ok
        cell["worst"] = max(cell["worst"], c.worst)
    for w, reason in outcome.holes.items():
        cells[w.op, (w.backend, w.dtype, w.soc or "")] = {"hole": reason}
    ops = sorted({op for op, _ in cells})
    worst = sorted((c for c in outcome.cases if c.ok), key=lambda c: -c.worst)[:25]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (files("tools.parity") / "page.html.jinja").read_text(encoding="utf-8")
    )
    return page.render(found=found, columns=columns, cells=cells, ops=ops, worst=worst, edges=_EDGES)
