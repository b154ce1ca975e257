"""`v4 parity`: judge backends on the contracts' samples, count the holes, try the mutants, and report.

Exit codes: 0 everything right, 1 a wrong case, a new hole, an unused known gap, a surviving mutant, a false alarm or no case at all,
2 could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from backends import NAMES
from ops.contract import CONTRACTS
from ops.mutants import LEGAL, MUTANTS, Plant
from ops.registry import unavailable
from tools import marked
from tools.doctor import machine
from tools.parity import gaps, report
from tools.parity.cases import TYPES, Outcome, combinations
from tools.parity.mutation import Mutation
from tools.parity.work import Cases, Unit, Variants, perform


def _nearest(what: str, found: Sequence[str], known: Sequence[str]) -> None:
    import difflib

    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"unknown {what} {name!r}; known: {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _listed(values: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    return [v for value in values for v in value.split(",") if v] if values else list(default)


def _refuse_existing(path: str | None, overwrite: bool) -> None:
    if path is not None and path != "-" and Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name or --overwrite")


def execute(args: argparse.Namespace) -> tuple[dict[str, Any], Outcome]:
    """Run what the arguments ask for; the report's JSON form and the outcome."""
    backends = _listed(args.backend, [name for name in NAMES if unavailable(name) is None])
    ops, dtypes, socs = _listed(args.op, sorted(CONTRACTS)), _listed(args.dtype, ("fp32", "bf16")), _listed(args.soc, ())
    _nearest("op", ops, sorted(CONTRACTS))
    _nearest("dtype", dtypes, list(TYPES))
    for name in [*backends, *([args.against] if args.against else [])]:
        if why := unavailable(name):
            raise ValueError(f"backend {name!r} can not run here: {why}")
    if args.samples < 1 or args.mutant_seeds < 0 or args.legal_seeds < 0 or args.jobs < 0:
        raise ValueError("--samples must be at least 1, --mutant-seeds, --legal-seeds and --jobs not negative")
    plant = Plant.parse(args.plant) if args.plant else None
    if plant and (plant.place or plant.step is not None):
        raise ValueError(f"--plant {args.plant}: places and steps exist in a model run only; give OP:MUTANT")
    cells = combinations(backends, ops, dtypes, socs)
    tried, tolerated = [o for o in ops if o in MUTANTS], [o for o in ops if o in LEGAL]
    mutant_seeds = range(args.seed, args.seed + args.mutant_seeds)
    legal_seeds = range(args.seed, args.seed + args.legal_seeds)
    units: list[Unit] = [Cases(where, args.seed, args.samples, args.sample, args.plant, args.against) for where in cells]
    units += [Variants(op, seed, legal=False) for op in tried for seed in mutant_seeds]
    units += [Variants(op, seed, legal=True) for op in tolerated for seed in legal_seeds]
    with tqdm(
        total=None if args.samples == 1 else sum(u.size for u in units),
        desc="parity",
        unit="case",
        disable=args.quiet or not sys.stderr.isatty(),
        delay=2,
    ) as bar:
        outcome, mutation = perform(units, args.jobs or os.cpu_count() or 1, args.threads or 1, bar.update)
    known = gaps.load(backends)
    holes = [] if args.sample else list(outcome.holes)
    new, unused = gaps.compare(holes, cells, known)
    if args.sample:
        unused = []
    problems = _problems(outcome, mutation, new, unused)
    if len(outcome.cases) < args.min_cases:
        problems.append(f"{len(outcome.cases)} cases were judged, expected at least {args.min_cases} (--min-cases)")
    found = machine()
    header = {
        "machine": f"{found['system']}, {found['cpus']} CPUs, python {found['python']}, torch {torch.__version__}",
        "command": shlex.join(["v4", *sys.argv[1:]]) if args.verb else "",
        "seed": args.seed,
    }
    return report.as_json(outcome, mutation, new, unused, header, problems), outcome


def _problems(outcome: Outcome, mutation: Mutation, new: Sequence[Any], unused: Sequence[gaps.Gap]) -> list[str]:
    problems = [f"{len(outcome.failures)} of {len(outcome.cases)} cases are wrong"] if outcome.failures else []
    if not outcome.cases:
        problems.append("no case was judged: nothing has been shown")
    problems += [
        f"new hole: {w}: {outcome.holes[w]} (cover it, or add a line to backends/{w.backend}/known_gaps.yaml)" for w in new
    ]
    problems += [f"known gap that is none any more: {g} (remove the line)" for g in unused]
    problems += [f"mutant survived: {s}" for s in mutation.survivors]
    return problems + [f"legal variant rejected: {a}" for a in mutation.false_alarms]


def run(args: argparse.Namespace) -> int:
    """The verb: prints the report, writes --json and --html; returns the exit code."""
    for path in (args.json, args.html):
        _refuse_existing(path, args.overwrite)
    # samples are small: more threads only wait for one another
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or 1)
    try:
        found, outcome = execute(args)
    finally:
        torch.set_num_threads(threads)
    if args.html:
        Path(args.html).write_text(report.html(found, outcome), encoding="utf-8")
    if args.markdown:
        marked.put(Path(args.markdown), "counts by op", report.markdown(found))
    if args.json == "-":
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        print(report.text(found))
    return 0 if found["ok"] else 1
