"""`v4 trace replay`: recorded calls judged as they were recorded, and again as a backend of this machine computes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ops.mutants import Plant
from ops.registry import Binding, bind, chain_of, load_backend, on_device, parse_overrides
from ops.trace import Call, Trace, TraceError, judge_again, judge_recorded
from tools.trace import selection
from tools.trace.progress import counted


def open_trace(args: argparse.Namespace, folder: str) -> Trace:
    """The trace of the command line. TraceError (could not run) for one that is damaged or does not fit --checkpoint."""
    checkpoint = getattr(args, "checkpoint", None)
    trace = Trace(Path(folder), partial=args.partial)
    if checkpoint is None:
        return trace
    return Trace(Path(folder), partial=args.partial, parameters=_parameters(trace, Path(checkpoint)))


def _parameters(trace: Trace, checkpoint: Path) -> Callable[[str], torch.Tensor]:
    # weights are read only where a trace has none; everything else works without what a checkpoint needs
    import v4
    from v4.config import Config

    found, recorded = json.loads(json.dumps(vars(Config.from_file(checkpoint)), default=vars)), trace.header.get("config", {})
    if found != recorded:
        names = sorted(k for k in {*found, *recorded} if found.get(k) != recorded.get(k))
        first = names[0]
        raise TraceError(
            f"{checkpoint}: another model than the one recorded: {first} is {found.get(first)}, the trace has {recorded.get(first)}"
            + (f" ({len(names) - 1} more fields differ)" if names[1:] else "")
        )
    h = trace.header
    model = v4.load(checkpoint, dtype=getattr(torch, h["dtype"]), numerics=h["numerics"], mtp=h["speculative"])
    return dict(model.runner.model.named_parameters()).__getitem__


def chosen(args: argparse.Namespace, trace: Trace) -> list[dict[str, Any]]:
    """Lines of the calls that have tensors and are asked for. TraceError when there are none."""
    places = {r["place"] for r in trace.records}
    wanted = selection.parse(args.places, args.only, args.steps, places)
    found = [r for r in trace.kept if wanted(r["place"], r["op"], r["step"])]
    if not found:
        raise TraceError(
            f"{trace.folder}: {len(trace.records)} calls, {len(trace.kept)} with tensors, none of them asked for: "
            "record with tensors, or ask for other --places, --only, --steps"
        )
    return found


def planted(args: argparse.Namespace, records: list[dict[str, Any]]) -> list[Plant]:
    """The faults to plant. ValueError for one that none of the calls meets: their results would be those of correct ops."""
    plants = [Plant.parse(text) for text in args.plant or ()]
    if missed := [str(p) for p in plants if not any(p.meets(r["op"], r["place"], r["count"]) for r in records)]:
        raise ValueError(
            f"planted fault {', '.join(missed)} meets none of the {len(records)} calls that are replayed; "
            "v4 trace show lists what the trace holds, --places, --only and --steps narrow it"
        )
    return plants


def _plants(plants: list[Plant], binding: Binding) -> Callable[[Call], Callable[..., Any]]:

    def function(call: Call) -> Callable[..., Any]:
        fn = getattr(binding.ops, call.op)
        for p in plants:
            if p.meets(call.op, call.place, call.count):
                fn = p.variant.make(fn)
        return fn

    return function


def _row(table: dict[str, dict[str, Any]], op: str) -> dict[str, Any]:
    return table.setdefault(
        op, {"calls": 0, "recorded_wrong": 0, "recorded_worst": 0.0, "replayed_wrong": 0, "replayed_worst": 0.0, "backends": []}
    )


def _note(row: dict[str, Any], side: str, verdict: Any) -> None:
    row[f"{side}_wrong"] += not verdict.ok
    row[f"{side}_worst"] = max(row[f"{side}_worst"], verdict.worst)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Judge both sides of every call asked for; the report (keys: docs/command-line.md)."""
    trace = open_trace(args, args.trace)
    records = chosen(args, trace)
    dtype = getattr(torch, trace.header["dtype"])
    ops = sorted({r["op"] for r in records})
    overrides = parse_overrides(args.ops) if args.ops else None
    binding = bind(chain_of(args.backend, strict=args.strict), dtype=dtype, overrides=overrides, only=ops)
    device = torch.device(load_backend(args.backend).DEVICE)
    plants = planted(args, records)
    function = _plants(plants, binding)
    table: dict[str, dict[str, Any]] = {}
    wrong: list[dict[str, Any]] = []
    for record in counted(records, len(records), "replay"):
        call = trace.call(record)
        fn = function(call)
        bound = call.sample()
        backend = binding.backend_of(call.op, bound.args, bound.kwargs)
        if device.type != "cpu":
            fn = on_device(fn, call.contract, device)
        sides = {"recorded": judge_recorded(call), "replayed": judge_again(call, fn)}
        row = _row(table, call.op)
        row["calls"] += 1
        row["backends"] = sorted({*row["backends"], backend})
        for side, verdict in sides.items():
            _note(row, side, verdict)
            if not verdict.ok:
                who = call.impl if side == "recorded" else backend
                wrong.append({
                    "side": side, "where": f"{call.op}@{call.place}#{call.count}", "op": call.op, "place": call.place,
                    "count": call.count, "step": call.step, "number": call.number, "backend": who,
                    "worst": verdict.worst if verdict.worst < float("inf") else None, "problems": list(verdict.problems),
                })  # fmt: skip
    for row in table.values():
        for side in ("recorded", "replayed"):
            row[f"{side}_worst"] = row[f"{side}_worst"] if row[f"{side}_worst"] < float("inf") else None
    h = trace.header
    return {
        "trace": str(trace.folder),
        "recorded_on": {k: h.get(k) for k in ("created", "backend", "dtype", "numerics", "versions", "plants")},
        "backend": args.backend,
        "plants": [str(p) for p in plants],
        "calls": len(records),
        "by_op": dict(sorted(table.items())),
        "wrong": wrong,
        "first_recorded": next((w for w in wrong if w["side"] == "recorded"), None),
        "first_replayed": next((w for w in wrong if w["side"] == "replayed"), None),
        "ok": not wrong,
    }


def _worst(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}"


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{'op':<22} {'calls':>6}  {'recorded':>16}  {'replayed':>16}  on",
        f"{'':<22} {'':>6}  {'wrong  worst':>16}  {'wrong  worst':>16}",
    ]
    for op, row in found["by_op"].items():
        sides = [f"{row[f'{s}_wrong']:>5}  {_worst(row[f'{s}_worst']):>9}" for s in ("recorded", "replayed")]
        lines.append(f"{op:<22} {row['calls']:>6}  {sides[0]:>16}  {sides[1]:>16}  {', '.join(row['backends'])}")
    for side, what in (("recorded", "recorded"), ("replayed", f"replayed on {found['backend']}")):
        if first := found[f"first_{side}"]:
            count = sum(w["side"] == side for w in found["wrong"])
            lines.append(
                f"FIRST WRONG as {what}: {first['where']} (step {first['step']}, backend {first['backend']}), {count} in all"
            )
            lines += [f"  {p}" for p in first["problems"]]
    if found["plants"] and not found["first_replayed"]:
        lines.append(Plant.harmless(found["plants"]))
    lines.append(f"{found['calls']} calls: " + ("all right, as recorded and as replayed" if found["ok"] else "WRONG"))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """The action; 0 when every call is right on both sides, 1 when one is wrong."""
    found = execute(args)
    print(json.dumps(found, ensure_ascii=False) if args.json else text(found))
    return 0 if found["ok"] else 1


def show(args: argparse.Namespace) -> int:
    """What a trace holds: the run, and calls by op."""
    trace = Trace(Path(args.trace), partial=args.partial)
    kept = {r["n"] for r in trace.kept}
    by_op: dict[str, dict[str, int]] = {}
    for r in trace.records:
        row = by_op.setdefault(r["op"], {"calls": 0, "with_tensors": 0})
        row["calls"] += 1
        row["with_tensors"] += r["n"] in kept
    size = sum(f.stat().st_size for f in trace.folder.iterdir())
    found: dict[str, Any] = {
        "trace": str(trace.folder),
        "bytes": size,
        "header": {k: v for k, v in trace.header.items() if k not in ("contracts", "ops", "config")},
        "steps": 1 + max((r["step"] for r in trace.records), default=-1),
        "calls": len(trace.records),
        "with_tensors": len(kept),
        "by_op": dict(sorted(by_op.items())),
        "end": trace.end,
    }
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    h = trace.header
    print(f"{trace.folder}: {size / 1e6:.1f} MB, recorded {h.get('created')} by: {h.get('command')}")
    print(
        f"backend {h.get('backend')}, {h.get('dtype')}, numerics {h.get('numerics')}, torch {h.get('versions', {}).get('torch')}"
    )
    for op, row in found["by_op"].items():
        print(f"{op:<22} {row['calls']:>6} calls, {row['with_tensors']:>6} with tensors")
    ended = "cut off" if trace.end is None else trace.end["failed"] or "complete"
    print(f"{found['calls']} calls in {found['steps']} steps, {found['with_tensors']} with tensors; {ended}")
    return 0
