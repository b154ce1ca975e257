"""The support table of README.md: op x backend x activation type x SoC, read from the registered implementations.

`python -m tools.support --write` puts it between the marks; a test keeps the two equal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from backends import NAMES
from ops import CONTRACTS
from ops.contract import Contract
from ops.registry import load_backend
from tools.marked import command, filled

MARK = "support table"
README = Path(__file__).resolve().parent.parent / "README.md"
OWN = "(own, optional)"
"""End of the name of an implementation whose kernel this repository holds as source and no vendor ships."""
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cell(contract: Contract, backend: str) -> str:
    """What a backend offers for an op: types and SoCs it is limited to, "any" without limits, "composed", or a dash."""
    impl = contract.impls.get(backend)
    if names := [i.name for i in contract.candidates(backend) if i.name]:
        first = "own op where installed" if all(n.endswith(OWN) for n in names) else "vendor ops"
        return f"{first}, then " + ("plain torch" if impl else f"composed of {', '.join(contract.parts)}")
    if impl is None:
        return f"composed of {', '.join(contract.parts)}" if contract.parts else "-"
    if impl.note.partition(":")[0] == "plain torch":
        return "plain torch"
    types = ", ".join(sorted(_SHORT.get(d, str(d)) for d in impl.dtypes)) or "any type"
    chips = ", ".join(sorted(impl.soc)) or "any chip"
    return (
        f"{types}; {chips}"
        + (f"; needs {', '.join(n.split(' (')[0] for n in impl.needs)}" if impl.needs else "")
        + ("; some shapes" if impl.when else "")
    )


def table() -> str:
    """Markdown table with a row per op and a column per backend."""
    for name in NAMES:
        load_backend(name)
    lines = ["| op | " + " | ".join(NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for name in sorted(CONTRACTS):
        lines.append(f"| {name} | " + " | ".join(cell(CONTRACTS[name], b) for b in NAMES) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """README text with the table between its marks. ValueError when a mark is absent."""
    return filled(text, MARK, table(), "README.md")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it into README.md with --write."""
    return command(argv, "tools.support", __doc__, README, MARK, table)


if __name__ == "__main__":
    sys.exit(main())
