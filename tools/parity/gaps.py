"""Known gaps: what a backend does not cover, as committed lines. A hole without a line fails, and so does a line without a hole."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from tools.parity.cases import Combination

_KEYS = ("op", "dtype", "soc", "reason")


@dataclass(frozen=True)
class Gap:
    """One line: patterns (shell style) of op, type and chip, and why it is so."""

    backend: str
    op: str
    dtype: str
    soc: str
    reason: str

    def covers(self, hole: Combination) -> bool:
        """Whether the line speaks of this hole."""
        pairs = ((hole.op, self.op), (hole.dtype, self.dtype), (hole.soc or "-", self.soc))
        return hole.backend == self.backend and all(fnmatch.fnmatchcase(value, pattern) for value, pattern in pairs)

    def __str__(self) -> str:
        return f"{self.backend}: op {self.op}, dtype {self.dtype}, soc {self.soc} ({self.reason})"


def parse(backend: str, text: str) -> list[Gap]:
    """Lines of a backend's known_gaps.yaml. ValueError names the line and what is wrong with it."""
    rows = yaml.safe_load(text) or []
    if not isinstance(rows, list):
        raise ValueError(
            f"known_gaps of {backend}: found {type(rows).__name__}, expected a list of lines with {', '.join(_KEYS)}"
        )
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row.get("op") or not row.get("reason"):
            raise ValueError(f"known_gaps of {backend}, line {i + 1}: found {row!r}, expected op and reason (and dtype, soc)")
        for key in row:
            if key not in _KEYS:
                near = difflib.get_close_matches(str(key), _KEYS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"known_gaps of {backend}, line {i + 1}: unknown key {key!r}{hint}")
        found.append(Gap(backend, str(row["op"]), str(row.get("dtype", "*")), str(row.get("soc", "*")), str(row["reason"])))
    return found


def load(backends: Iterable[str]) -> list[Gap]:
    """The committed lines of these backends (backends/<name>/known_gaps.yaml; no file: no gaps)."""
    found = []
    for backend in backends:
        path = files(f"backends.{backend}") / "known_gaps.yaml"
        if path.is_file():
            found += parse(backend, path.read_text(encoding="utf-8"))
    return found


def compare(holes: Sequence[Combination], run: Sequence[Combination], gaps: Sequence[Gap]) -> tuple[list[Combination], list[Gap]]:
    """(holes without a line, lines that no hole needed although combinations they speak of were looked at)."""
    new = [hole for hole in holes if not any(gap.covers(hole) for gap in gaps)]
    unused = [g for g in gaps if any(g.covers(c) for c in run) and not any(g.covers(hole) for hole in holes)]
    return new, unused
