"""The coverage table of docs/ascend.md: contract x chip x activation type -> the vendor op that serves it, or why plain torch does.

Read from the registered implementations as they would be bound on a node with every package. `python -m tools.ascend_coverage --write`
puts it between the marks; a test keeps the two equal.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind, load_backend
from tools.marked import command, filled

MARK = "coverage table"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "ascend.md"
CHIPS = {"a2": "910b", "a3": "910_93", "950": "950"}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def served(op: str, soc: str, dtype: torch.dtype) -> str:
    """What runs `op` there: vendor ops in the order they are tried; where there are none, plain torch or the op's parts, with the reason."""
    load_backend("ascend")
    contract = CONTRACTS[op]
    binding = bind(("ascend",), dtype=dtype, probes={"ascend": Probe(soc=soc, ask=lambda name: True)}, only=[op])
    if names := [impl.name for impl in binding.impls[op] if impl.name]:
        return ", or ".join(names)
    last = binding.impls[op][-1]
    there = [i for i in contract.candidates("ascend") if i.name and (not i.soc or soc in i.soc)]
    if there:
        types = sorted({short for short, d in TYPES.items() for i in there if not i.dtypes or d in i.dtypes})
        return f"{last.note}: vendor ops for {', '.join(types)} only"
    elsewhere = sorted({_chip(s) for i in contract.candidates("ascend") if i.name for s in i.soc})
    return last.note + (f": vendor ops documented for {', '.join(elsewhere)}" if elsewhere else "")


def _chip(soc: str) -> str:
    return next(chip for chip, family in CHIPS.items() if family == soc)


def rows() -> list[tuple[str, str, str, str]]:
    """(contract, chips, types, what serves it), chips and types with equal answers joined."""
    load_backend("ascend")
    found = []
    for op in sorted(CONTRACTS):
        answers: dict[str, list[tuple[str, str]]] = {}
        for chip, soc in CHIPS.items():
            for short, dtype in TYPES.items():
                answers.setdefault(served(op, soc, dtype), []).append((chip, short))
        for answer, cells in answers.items():
            by_types: dict[tuple[str, ...], list[str]] = {}
            for chip in CHIPS:
                if types := tuple(t for c, t in cells if c == chip):
                    by_types.setdefault(types, []).append(chip)
            for types, chips in by_types.items():
                found.append((op, " ".join(chips), "all" if len(types) == len(TYPES) else " ".join(types), answer))
    return found


def table() -> str:
    """Markdown."""
    lines = ["| contract | chips | types | served by |", "|---|---|---|---|"]
    previous = ""
    for op, chips, types, answer in rows():
        lines.append(f"| {op if op != previous else ''} | {chips} | {types} | {answer} |")
        previous = op
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page with the table between its marks. ValueError when a mark is absent."""
    return filled(text, MARK, table(), PAGE.name)


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it into docs/ascend.md with --write."""
    return command(argv, "tools.ascend_coverage", __doc__, PAGE, MARK, table)


if __name__ == "__main__":
    raise SystemExit(main())
