"""The same evaluation on every backend and precision mode, each in a process of its own, and one table of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.eval.apart import choice_differences, token_difference

BASE = "cpu-fp32"
MARK = "nano on every backend"


@dataclass(frozen=True)
class Mode:
    """environment: name of the Python that it needs. soc: chip of the stand-in. options of v4 eval. target: conversion of the
    checkpoint that it reads (None: as it is)."""

    title: str
    options: tuple[str, ...]
    environment: str = "cpu"
    soc: str | None = None
    target: str | None = None


def _ascend(title: str, soc: str, *options: str, target: str | None = None) -> Mode:
    return Mode(title, ("--backend", "ascend", "--dtype", "bfloat16", *options), "ascend", soc, target)


MODES = {
    BASE: Mode("CPU, fp32", ("--dtype", "float32")),
    "cpu-bf16": Mode("CPU, bf16", ("--dtype", "bfloat16")),
    "cpu-reference": Mode("CPU, bf16, the official FP8 and FP4 round trips", ("--dtype", "bfloat16", "--numerics", "reference")),
    "a3-bf16": _ascend("Ascend A3 (stand-in), bf16", "a3"),
    "a3-w8a8": _ascend("Ascend A3 (stand-in), W8A8", "a3", "--numerics", "stored", target="ascend-a3-w8a8"),
    "950-mx": _ascend("Ascend 950 (stand-in), FP8 and MXFP4", "950", "--numerics", "stored"),
    "cuda-bf16": Mode("one GPU, Triton kernels, bf16", ("--backend", "cuda", "--dtype", "bfloat16"), "cuda"),
}


@dataclass(frozen=True)
class Plan:
    """What every mode runs. pythons: environment -> interpreter."""

    model: Path
    out: Path
    pythons: dict[str, str]
    lengths: str = "1024"
    trials: int = 200
    texts: int = 2
    text_length: int = 320
    new_tokens: int = 64
    judge: str = "choices"


def _run(plan: Plan, mode: Mode, command: list[str]) -> int:
    head = [plan.pythons[mode.environment], "-m"]
    head += ["tools.cli"] if mode.soc is None else ["tools.npu_standin", "--soc", mode.soc, "--"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([*head, *command], env=environment, stdout=subprocess.DEVNULL).returncode


def _converted(plan: Plan, mode: Mode) -> Path:
    if mode.target is None:
        return plan.model
    out = plan.out / mode.target
    if not (out / "config.json").is_file():
        command = [plan.pythons["cpu"], "-m", "tools.cli", "checkpoint", "convert", str(plan.model), "--target", mode.target, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def _check(saved: Path, kind: str, plan: Plan, model: str) -> None:
    found = json.loads(saved.read_text(encoding="utf-8"))
    if kind == "needle":
        made, wanted = [r["length"] for r in found["lengths"]], [int(n) for n in plan.lengths.split(",")]
        same = made == wanted and found["trials"] == plan.trials
    else:
        keys = ("trials", "length", "new_tokens", "judge")
        same = [found[k] for k in keys] == [plan.texts, plan.text_length, plan.new_tokens, plan.judge]
    if not same or found["model"] != model:
        raise ValueError(f"{saved}: made with other settings or another model; give another --out, or remove it")


def run_mode(plan: Plan, name: str, say: Callable[[str], None]) -> None:
    """Needle accuracy and greedy text of one mode, written to files of its name in plan.out; nothing is run that is there already.

    ValueError when a run fails: a mode that can not be run is no result.
    """
    mode, out = MODES[name], plan.out
    common = ["--model", str(_converted(plan, mode)), *mode.options, "--json"]
    needle = ["eval", "needle", *common, "--lengths", plan.lengths, "--trials", str(plan.trials)]
    greedy = ["eval", "greedy", *common, "--trials", str(plan.texts), "--length", str(plan.text_length)]
    greedy += ["--new-tokens", str(plan.new_tokens), "--judge", plan.judge, "--tensors", str(out / f"{name}.greedy.pt")]
    if name != BASE:
        greedy += ["--follow", str(out / f"{BASE}.greedy.json")]
    for kind, command, least in (("greedy", greedy, 1), ("needle", needle, 0)):
        saved = out / f"{name}.{kind}.json"
        if saved.is_file():
            _check(saved, kind, plan, str(command[command.index("--model") + 1]))
            say(f"{name}: {saved} is there, not run again")
            continue
        say(f"{name}: {kind}")
        code = _run(plan, mode, [*command, "--save", str(saved)])
        # 1 says that calls were wrong: the table shows it
        if code > least or not saved.is_file():
            raise ValueError(f"{name}: v4 eval {kind} ended with code {code}; run it alone: v4 {' '.join(command)}")


def compare(out: Path, name: str) -> dict[str, Any]:
    """One mode beside the base: needle rows, first unlike token of each text, unlike choices, wrong calls."""
    base, found = (json.loads((out / f"{n}.greedy.json").read_text(encoding="utf-8")) for n in (BASE, name))
    ours, theirs = (torch.load(out / f"{n}.greedy.pt", weights_only=True) for n in (BASE, name))
    texts = []
    for n, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        texts.append(
            {
                "token": token_difference(base["tokens"][n], found["tokens"][n], left["logits"], right["logits"]),
                **{op: choice_differences(op, left["choices"], right["choices"]) for op in ("index_topk", "gate_topk")},
            }
        )
    needle = json.loads((out / f"{name}.needle.json").read_text(encoding="utf-8"))
    return {
        "mode": name, "title": MODES[name].title, "needle": needle["lengths"], "texts": texts, "tokens": len(base["tokens"][0]),
        "judged": found["judged"], "wrong": found["wrong"],
    }  # fmt: skip


def _choices(texts: list[dict[str, Any]], op: str) -> str:
    rows, unlike, near, tied = (sum(t[op][k] for t in texts) for k in ("rows", "unlike", "near", "tied"))
    if not unlike:
        return f"0 of {rows}; {tied} tied"
    first = next(t[op]["first"] for t in texts if t[op]["first"])
    return f"{unlike} of {rows}, {near} near ties; first: margin {first['margin']:.2g}, apart {first['apart']:.2g}; {tied} tied"


def _token(text: dict[str, Any], tokens: int) -> str:
    d = text["token"]
    if d is None:
        return f"all {tokens}"
    return f"{d['token']}: margin {d['margin']:.2g}, apart {d['apart']:.2g}, {'near tie' if d['near'] else 'NO NEAR TIE'}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and what its columns mean."""
    lines = ["| mode | needles found, 95 % interval | same text up to token | lists of entries unlike | lists of experts unlike | calls judged, wrong |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        needle = "; ".join(f"{r['length']}: {r['accuracy']:.1%} ({r['low']:.1%} to {r['high']:.1%}) of {r['trials']}" for r in row["needle"])
        texts = "; ".join(_token(t, row["tokens"]) for t in row["texts"])
        choices = " | ".join(_choices(row["texts"], op) for op in ("index_topk", "gate_topk"))
        lines.append(f"| {row['title']} | {needle} | {texts} | {choices} | {row['judged']}, {len(row['wrong'])} |")
    return "\n".join(lines)


def report(plan: Plan, names: list[str]) -> dict[str, Any]:
    """Run the modes and compare them. ValueError for unknown modes, a missing environment, or a run that fails."""
    if unknown := set(names) - set(MODES):
        raise ValueError(f"unknown modes {', '.join(sorted(unknown))}; known: {', '.join(MODES)}")
    ordered = [n for n in MODES if n in {*names, BASE}]
    for name in ordered:
        if (environment := MODES[name].environment) not in plan.pythons:
            raise ValueError(f"{name}: needs --{environment}-python, the interpreter of an environment with its packages")
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in ordered:
        run_mode(plan, name, lambda line: print(line, file=sys.stderr, flush=True))
    return {"model": str(plan.model), "modes": [compare(plan.out, name) for name in ordered]}
