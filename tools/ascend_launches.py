"""Launches per decode step and layer kind: the sequence of cann-recipes' published model, read from its source, beside this backend's, counted.

`python -m tools.ascend_launches --write` puts the table into docs/performance.md. The data stand in tools/ascend_launches.yaml: theirs line by
line with the place it was read from, ours as tests/ascend/test_standin_launches_modes.py counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.marked import command, filled

MARK = "ascend launches"
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
KINDS, PARTS = ("SWA", "CSA", "HCA"), ("vendor", "aten")
_data: dict[str, Any] = yaml.safe_load((ROOT / "tools" / "ascend_launches.yaml").read_text(encoding="utf-8"))
OURS: Mapping[str, Mapping[str, Mapping[str, int]]] = _data["ours"]
"""Chip -> layer kind -> part ("vendor": fused op, "aten": op of torch that launches a kernel) -> launches of one layer."""


def theirs(chip: str, kind: str) -> dict[str, int]:
    """Launches of one layer by part. KeyError for a chip or kind that is not in the data."""
    if kind not in KINDS:
        raise KeyError(kind)
    lines = [line for line in _data["theirs"][chip] if kind in line["kinds"]]
    return {part: sum(line["count"] for line in lines if line["part"] == part) for part in PARTS}


def table() -> str:
    """Markdown."""
    lines = ["| mode | layer | recipe: fused + torch | here: fused + torch | more here: fused, all |", "|---|---|---|---|---|"]
    for chip, mode in _data["modes"].items():
        for kind in KINDS:
            a, b = theirs(chip, kind), OURS[chip].get(kind)
            line = f"| {mode} | {kind} | {a['vendor']} + {a['aten']} "
            if b is None:
                lines.append(line + "| not counted yet | |")
            else:
                more = f"{b['vendor'] - a['vendor']:+d}, {sum(b.values()) - sum(a.values()):+d}"
                lines.append(line + f"| {b['vendor']} + {b['aten']} | {more} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page with the table between its marks. ValueError when a mark is absent."""
    return filled(text, MARK, table(), PAGE.name)


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it into docs/performance.md with --write."""
    return command(argv, "tools.ascend_launches", __doc__, PAGE, MARK, table)


if __name__ == "__main__":
    raise SystemExit(main())
