"""Parity of the ascend backend as one matrix: contract x chip x activation type, with the precision class and what was measured.

`python -m tools.ascend_parity run --out DIR` judges every contract on each chip in a process of its own: on the stand-in, or with --here on
the NPU of this machine. `table DIR` prints the matrix of what was measured, `--markdown FILE` puts it between the marks of a page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tools import marked

MARK = "measured parity"
CHIPS = {"910b": "a2", "910_93": "a3", "950": "950"}
TYPES = ("bf16", "fp32", "fp16")


class Class(NamedTuple):
    """A precision class: the largest error/bound allowed, and its meaning in words."""

    worst: float
    means: str


class Precision(NamedTuple):
    """backends/ascend/precision.yaml: classes by name, the class of each contract, and what adapters round between their parts."""

    classes: Mapping[str, Class]
    contracts: Mapping[str, str]
    rounds_between: Mapping[str, str]


def declared() -> Precision:
    """The declared classes. ValueError for a contract of an unknown class."""
    found = yaml.safe_load(files("backends.ascend").joinpath("precision.yaml").read_text(encoding="utf-8"))
    classes = {name: Class(float(row["worst"]), str(row["means"])) for name, row in found["classes"].items()}
    if wrong := {op: name for op, name in found["contracts"].items() if name not in classes}:
        raise ValueError(f"precision.yaml: classes that are not declared: {wrong}; known: {', '.join(classes)}")
    return Precision(classes, found["contracts"], found["rounds_between"])


def command(chip: str, dtype: str, samples: int, out: Path, *, here: bool) -> list[str]:
    """What judges one chip and type."""
    head = [sys.executable, "-m"] + (["tools.cli"] if here else ["tools.npu_standin", "--soc", CHIPS[chip], "--"])
    options = {"backend": "ascend", "soc": chip, "dtype": dtype, "samples": samples, "mutant-seeds": 0, "legal-seeds": 0, "json": out}
    return [*head, "parity", "--quiet", "--overwrite", *(f"--{k}={v}" for k, v in options.items())]


def run(out: Path, chips: Sequence[str], types: Sequence[str], samples: int, *, here: bool) -> int:
    """Judge chip after chip; the number of runs that failed. What is written stays when a later run fails."""
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for chip in chips:
        for dtype in types:
            target = out / f"{chip}_{dtype}.json"
            target.unlink(missing_ok=True)
            print(f"{CHIPS[chip]} {dtype} ...", file=sys.stderr, flush=True)
            code = subprocess.run(command(chip, dtype, samples, target, here=here), stdout=subprocess.DEVNULL, check=False).returncode
            if not target.is_file():
                raise ValueError(f"{chip} {dtype}: v4 parity could not run (exit code {code}); its message stands above")
            failed += code != 0
    return failed


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(chip, type) -> report of `v4 parity --json`. ValueError when there is none."""
    found = {
        (chip, dtype): json.loads(path.read_text(encoding="utf-8"))
        for chip in CHIPS
        for dtype in TYPES
        if (path := folder / f"{chip}_{dtype}.json").is_file()
    }
    if not found:
        raise ValueError(f"{folder}: no reports; python -m tools.ascend_parity run --out {folder} makes them")
    return found


def complaints(found: Mapping[tuple[str, str], dict[str, Any]], precision: Precision) -> list[str]:
    """Wrong cases, holes, and cells worse than their class allows."""
    out = []
    for (chip, dtype), report in found.items():
        where = f"on {CHIPS[chip]}, {dtype}"
        out += [f"{h['op']} {where}: not judged: {h['reason']}" for h in report["holes"]]
        for op, row in report["by_op"].items():
            allowed = precision.classes[precision.contracts[op]].worst
            if row["failures"]:
                out.append(f"{op} {where}: {row['failures']} of {row['cases']} cases are wrong")
            elif row["worst"] > allowed:
                out.append(f"{op} {where}: error/bound {row['worst']:.3g}, class {precision.contracts[op]} allows {allowed:g}")
    return out


def _cell(report: dict[str, Any] | None, op: str) -> str:
    if report is None:
        return "not run"
    row = report["by_op"].get(op)
    if row is None or not row["cases"]:
        return next((f"hole: {h['reason']}" for h in report["holes"] if h["op"] == op), "hole")
    return f"{row['failures']} of {row['cases']} wrong" if row["failures"] else f"{row['worst']:.2f} ({row['cases']})"


def table(found: Mapping[tuple[str, str], dict[str, Any]], precision: Precision) -> str:
    """Markdown: a row per contract, a column per chip and type, largest error/bound and judged cases in each cell."""
    columns = [(chip, dtype) for chip in CHIPS for dtype in TYPES]
    lines = [
        "| contract | class | " + " | ".join(f"{CHIPS[c]} {t}" for c, t in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for op in sorted(precision.contracts):
        cells = [_cell(found.get(column), op) for column in columns]
        lines.append(f"| {op} | {precision.contracts[op]} | " + " | ".join(cells) + " |")
    cases = sum(report["cases"] for report in found.values())
    wrong = sum(len(report["failures"]) for report in found.values())
    lines += ["", f"{cases:,} judged cases, {wrong} wrong.", "", "| class | means | largest error/bound allowed |", "|---|---|---|"]
    lines += [f"| {name} | {c.means} | {c.worst:g} |" for name, c in precision.classes.items()]
    lines += ["", "| adapter | also rounds to the stored type |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {what} |" for name, what in precision.rounds_between.items())])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.ascend_parity", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("run", help="judge every contract on every chip and type")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="reports, one file per chip and type")
    p.add_argument("--chip", action="append", choices=tuple(CHIPS), help="only this chip (may be repeated)")
    p.add_argument("--dtype", action="append", choices=TYPES, help="only this type (may be repeated)")
    p.add_argument("--samples", type=int, default=20, metavar="N", help="at least N cases of each cell (default 20)")
    p.add_argument("--here", action="store_true", help="on the NPU of this machine instead of the stand-in; needs --chip")
    p = verbs.add_parser("table", help="the matrix of reports")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--markdown", type=Path, metavar="FILE", help=f'put it between the marks "{MARK}" of this page')
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb: 0 when everything is right, 1 when a cell is not, 2 when it could not run."""
    args = parser().parse_args(argv)
    try:
        precision = declared()
        if args.verb == "run":
            if args.here and len(args.chip or ()) != 1:
                raise ValueError("--here: give the chip of this machine with --chip")
            run(args.out, args.chip or tuple(CHIPS), args.dtype or TYPES, args.samples, here=args.here)
        folder = args.out if args.verb == "run" else args.folder
        found = read(folder)
        if args.verb == "table" and args.markdown:
            marked.put(args.markdown, MARK, table(found, precision))
        else:
            print(table(found, precision))
        wrong = complaints(found, precision)
    except ValueError as error:
        print(f"ascend_parity: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
