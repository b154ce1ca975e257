"""Pitfalls that were reported for this model, and the test of this repository that fails when one is made: inventory and page.

The inventory is tests/pitfalls.yaml. `python -m tools.pitfalls --write` puts it into docs/pitfalls.md as tables; tests/test_pitfalls.py holds
every entry to tests that exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.marked import command, filled

MARK = "pitfalls"
ROOT = Path(__file__).resolve().parent.parent
FILE, PAGE = ROOT / "tests" / "pitfalls.yaml", ROOT / "docs" / "pitfalls.md"
PLACES = ("ascend", "cpu", "cuda", "graph", "checkpoint", "tools", "nowhere")
_KEYS = {"id", "row", "pitfall", "where", "mutants", "tests", "reason"}


@dataclass(frozen=True)
class Check:
    """`test`: file::function, or file::function[case]; `plant`: how the fault is made there."""

    test: str
    plant: str

    @property
    def file(self) -> str:
        """Path from the repository's root."""
        return self.test.partition("::")[0]

    @property
    def function(self) -> str:
        """Name of the test function."""
        return self.test.partition("::")[2].partition("[")[0]

    @property
    def case(self) -> str:
        """What stands in brackets, without the chip; empty where every case of the function is meant."""
        return self.test.partition("[")[2].removesuffix("]")


@dataclass(frozen=True)
class Pitfall:
    """One row of a document: where the fault can be in this repository, mutants OP:NAME of contracts, tests, or why there are none."""

    id: str
    document: str
    row: str
    pitfall: str
    where: tuple[str, ...]
    mutants: tuple[str, ...]
    tests: tuple[Check, ...]
    reason: str


def _entry(document: str, found: dict[str, Any]) -> Pitfall:
    name = found.get("id", "an entry without id")
    if unknown := set(found) - _KEYS:
        raise ValueError(f"{FILE.name}: {name}: unknown keys {', '.join(sorted(unknown))}")
    if missing := [key for key in ("id", "row", "pitfall", "where") if not found.get(key)]:
        raise ValueError(f"{FILE.name}: {name}: {', '.join(missing)} missing")
    where = tuple(found["where"])
    if wrong := [place for place in where if place not in PLACES]:
        raise ValueError(f"{FILE.name}: {name}: where is {wrong[0]!r}, expected some of {', '.join(PLACES)}")
    tests = tuple(Check(*pair) for pair in found.get("tests", ()))
    mutants = tuple(found.get("mutants", ()))
    if ("nowhere" in where) != (not tests and not mutants):
        raise ValueError(f"{FILE.name}: {name}: an entry has tests or mutants, or it is nowhere")
    if "nowhere" in where and (len(where) > 1 or not found.get("reason")):
        raise ValueError(f"{FILE.name}: {name}: what can be nowhere needs a reason, and no other place")
    return Pitfall(name, document, found["row"], found["pitfall"], where, mutants, tests, found.get("reason", ""))


def inventory(path: Path = FILE) -> tuple[Pitfall, ...]:
    """Every entry, in the order of the documents' rows. ValueError names an entry that is incomplete or contradicts itself."""
    documents = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tuple(_entry(document, entry) for document, entries in documents.items() for entry in entries)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _caught(p: Pitfall) -> str:
    if p.reason:
        return _cell(p.reason)
    lines = [f"`{c.file.removeprefix('tests/')}::{c.function}`" + (f" {_cell(c.case)}" if c.case else "") + f": {_cell(c.plant)}" for c in p.tests]
    if p.mutants:
        lines.append("mutants " + ", ".join(f"`{m}`" for m in p.mutants))
    return "<br>".join(lines)


def table(pitfalls: Iterable[Pitfall] | None = None) -> str:
    """Markdown: a heading and a table per document."""
    lines: list[str] = []
    document = ""
    for p in inventory() if pitfalls is None else pitfalls:
        if p.document != document:
            document = p.document
            lines += ["", f"### {document}", "", "| | pitfall | can be in | seen by: how it is planted |", "|---|---|---|---|"]
        lines.append(f"| {p.id} | {_cell(p.pitfall)} | {', '.join(p.where)} | {_caught(p)} |")
    return "\n".join(lines).strip()


def with_table(text: str) -> str:
    """The page with the tables between their marks. ValueError when a mark is absent."""
    return filled(text, MARK, table(), PAGE.name)


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them into docs/pitfalls.md with --write."""
    return command(argv, "tools.pitfalls", __doc__, PAGE, MARK, table)


if __name__ == "__main__":
    raise SystemExit(main())
