"""`v4 trace bisect`: the first call that is wrong, of a recorded trace or of a run that is judged while it goes."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from ops.mutants import Plant
from ops.trace import Call, Finding, Recorder, Selection, Trace, changed, finding
from tools.trace import selection
from tools.trace.progress import counted
from tools.trace.replay import chosen, open_trace


class Found(Exception):
    """Ends a run at its first wrong call."""


class Judge:
    """A sink that judges every call it is given as soon as it has run. `every`: go on after the first wrong one."""

    def __init__(self, wanted: Selection, every: bool) -> None:
        self.wanted, self.every = wanted, every
        self.findings: list[Finding] = []
        self.judged = 0
        self._names: list[str] = []

    def wants(self, place: str, op: str, step: int) -> bool:
        """Whether the call is to be judged."""
        return self.wanted(place, op, step)

    def line(self, call: Call) -> None:
        """A call that is not judged: its arguments are still held against what earlier calls returned."""
        self._note(call, changed(call, self._names.__getitem__))

    def kept(self, call: Call, parameters: Mapping[str, str]) -> None:
        """A call to judge."""
        self.judged += 1
        self._note(call, finding(call, self._names.__getitem__))

    def _note(self, call: Call, found: Finding | None) -> None:
        self._names.append(call.where)
        if found is None:
            return
        self.findings.append(found)
        if not self.every:
            raise Found


def of_trace(trace: Trace, args: argparse.Namespace) -> tuple[list[Finding], int]:
    """Wrong calls of a recording in the order they ran (the first one, or with --all every one), and the number judged."""
    findings: list[Finding] = []
    judged = {r["n"] for r in chosen(args, trace)}
    seen = 0
    for record in counted(trace.records, len(trace.records), "bisect"):
        if record["n"] in judged:
            found = finding(trace.call(record), trace.where)
            seen += 1
        else:
            found = changed(trace.bare(record), trace.where)
        if found:
            findings.append(found)
            if not args.all:
                break
    return findings, seen


def _of_run(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from tools import generate
    from tools.trace.record import places_of
    from v4.config import Config

    request = generate.prepare(args)
    places = places_of(Config.from_file(Path(str(request.settings.model))))
    judge = Judge(selection.parse(args.places, args.only, args.steps, places), args.all)
    generate.announce(request, "trace bisect")
    recorder = Recorder()
    model = generate.load(request, recorder.scope)
    recorder.attach(model.runner.model, model.binding, judge)
    report: dict[str, Any] | None = None
    with contextlib.suppress(Found):
        report = generate.answer(request, model, lambda piece: None)
    result = {
        "judged": judge.judged,
        "calls": recorder.number,
        "findings": [f.as_dict() for f in judge.findings],
        "swap": None,
        "backend": request.settings.backend,
        "plants": [str(p) for p in request.plants],
    }
    if judge.findings or args.no_swap or report is None:
        return result
    from tools.trace import swap

    print(
        f"bisect: {judge.judged} calls are right by themselves; swapping ops with {args.against}, one at a time", file=sys.stderr
    )
    return {**result, "swap": swap.search(request, report["tokens"], args.against)}


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Find the first wrong call (keys: docs/command-line.md)."""
    if args.trace is not None:
        if args.model or args.config or args.prompt or args.chat or args.ids:
            raise ValueError("--trace looks at what was recorded: leave out the model and the prompt, or leave out --trace")
        trace = open_trace(args, args.trace)
        findings, judged = of_trace(trace, args)
        found: dict[str, Any] = {
            "judged": judged,
            "calls": len(trace.records),
            "findings": [f.as_dict() for f in findings],
            "swap": None,
            "backend": trace.header.get("backend"),
            "plants": trace.header.get("plants", []),
        }
    else:
        found = _of_run(args)
    first = found["findings"][0] if found["findings"] else None
    swapped = (found["swap"] or {}).get("found")
    return {**found, "trace": args.trace, "first": first, "ok": first is None and not swapped}


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for f in found["findings"]:
        head = "FIRST WRONG CALL" if f is found["findings"][0] else "also wrong"
        lines.append(f"{head}: {f['op']}@{f['place']}#{f['count']} (step {f['step']}, backend {f['impl']})")
        lines += [f"  {p}" for p in f["problems"]]
    if found["swap"]:
        lines += found["swap"]["sentences"]
    if found["ok"]:
        if found["plants"]:
            lines.append(Plant.harmless(found["plants"]))
        lines.append(f"nothing wrong: {found['judged']} calls judged, {found['calls']} looked at")
    elif found["first"] and found["trace"] is None:
        f = found["first"]
        place = f["place"].removeprefix("layers.")
        lines.append(
            f"  keep it: v4 trace record --out DIR --places {place} --only {f['op']} --steps {f['step']} (and the options of this run)"
        )
    elif found["first"]:
        f = found["first"]
        place = f["place"].removeprefix("layers.")
        lines.append(
            f"  again, on a backend of this machine: v4 trace replay {found['trace']} --places {place} --only {f['op']} --steps {f['step']}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """The action; 0 when nothing is wrong, 1 when a call, or an op that had to be swapped, is."""
    found = execute(args)
    print(json.dumps(found, ensure_ascii=False) if args.json else text(found))
    return 0 if found["ok"] else 1
