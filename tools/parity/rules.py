"""Decision rules of other suites beside the judge, on the same mutants, legal variants and samples.

`python -m tools.parity.rules` prints the table. Each rule sees what the judge sees: the same samples, outputs and golden. A mutant is
caught when the rule rejects at least one sample of the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ops.contract import CONTRACTS, Contract, Sample
from ops.judge import call_with_clones, golden_of, judge
from ops.mutants import LEGAL, MUTANTS, rounded_reference, samples_by_size
from ops.mutants.core import Variant
from tools import marked

MARK = "rules"
Rule = Callable[[Tensor, Tensor], bool]
_DTYPES = (torch.float32, torch.bfloat16)


def _correlated(y: Tensor, g: Tensor) -> bool:
    if y.numel() < 2 or float(g.std()) == 0 or float(y.std()) == 0:
        return bool(torch.allclose(y, g))
    # a NaN compares as "not below", as in the suites that write `if corr < 0.99: fail`
    return not float(torch.corrcoef(torch.stack((y.flatten(), g.flatten())))[0, 1]) < 0.99


def _cosine(y: Tensor, g: Tensor) -> bool:
    norms = float(y.norm() * g.norm())
    return bool(torch.allclose(y, g)) if norms == 0 else float((y * g).sum()) / norms > 0.99


def _nmse(y: Tensor, g: Tensor) -> bool:
    size = float(g.square().sum())
    return float((y - g).square().sum()) <= 5e-4 * size


def _share(y: Tensor, g: Tensor) -> bool:
    near = (y - g).abs() <= 5e-3 * g.abs()
    return float(near.double().mean()) >= 0.995


RULES: dict[str, Rule] = {
    "Pearson >= 0.99": _correlated,
    "cosine > 0.99": _cosine,
    "NMSE <= 5e-4": _nmse,
    "99.5 % of elements within 0.5 %": _share,
}
"""Rules over y and golden in float64, element for element; `assert_close` is apart because it depends on the stored type."""


def _close(y: Tensor, g: Tensor) -> bool:
    try:
        torch.testing.assert_close(y, g.to(y.dtype), equal_nan=True)
    except AssertionError:
        return False
    return True


def _as_number(t: Tensor) -> Tensor:
    return (t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t).double()


def verdicts(contract: Contract, fn: Callable[..., Any], sample: Sample, golden: list[Tensor]) -> dict[str, bool]:
    """Rule -> whether it accepts what `fn` gives for the sample."""
    found, _ = call_with_clones(contract, fn, sample)
    pairs = [(y, g) for y, g in zip(found, golden, strict=False) if y.shape == g.shape and y.numel()]
    shapes = len(found) == len(golden) and all(y.shape == g.shape for y, g in zip(found, golden, strict=False))
    accepted = {name: shapes and all(rule(_as_number(y), _as_number(g)) for y, g in pairs) for name, rule in RULES.items()}
    accepted["assert_close defaults"] = shapes and all(_close(y, g) for y, g in pairs)
    accepted["this judge"] = judge(contract, fn, sample, golden=golden).ok
    return accepted


NAMES = (*RULES, "assert_close defaults", "this judge")


def compare(ops: Sequence[str], seed: int, step: Callable[[], object] = lambda: None) -> dict[str, dict[str, int]]:
    """Per rule: mutants, caught, legal_cases, false_alarms over one seed, both types."""
    table = {name: {"mutants": 0, "caught": 0, "legal_cases": 0, "false_alarms": 0} for name in NAMES}
    for op in ops:
        contract = CONTRACTS[op]
        correct = rounded_reference(contract)
        for dtype in _DTYPES:
            missed: dict[str, set[Variant]] = {name: {m for m in MUTANTS[op].values() if dtype in m.dtypes} for name in NAMES}
            for name in NAMES:
                table[name]["mutants"] += len(missed[name])
            for sample in samples_by_size(contract, dtype, seed):
                golden = golden_of(contract, sample)
                for m in set().union(*missed.values()):
                    for name, ok in verdicts(contract, m.make(correct), sample, golden).items():
                        if not ok:
                            missed[name].discard(m)
                for v in LEGAL.get(op, {}).values():
                    if dtype not in v.dtypes:
                        continue
                    for name, ok in verdicts(contract, v.make(correct), sample, golden).items():
                        table[name]["legal_cases"] += 1
                        table[name]["false_alarms"] += not ok
            for name in NAMES:
                table[name]["caught"] += sum(dtype in m.dtypes for m in MUTANTS[op].values()) - len(missed[name])
        step()
    return table


def markdown(table: dict[str, dict[str, int]]) -> str:
    """The table for docs/parity.md."""
    lines = ["| rule | mutants caught | legal cases rejected |", "|---|---|---|"]
    for name, row in table.items():
        caught = f"{row['caught']} of {row['mutants']} ({100 * row['caught'] / max(row['mutants'], 1):.1f} %)"
        lines.append(f"| {name} | {caught} | {row['false_alarms']} of {row['legal_cases']} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table as markdown, or as JSON."""
    options = argparse.ArgumentParser(prog="python -m tools.parity.rules", description=__doc__)
    options.add_argument("--op", action="append", choices=sorted(MUTANTS), help="only this op (may be given more than once)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    options.add_argument("--markdown", type=Path, help="put the table between the marks of this page too")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    ops = args.op or sorted(MUTANTS)
    with tqdm(total=len(ops), desc="rules", unit="op", disable=not sys.stderr.isatty()) as bar:
        table = compare(ops, args.seed, bar.update)
    print(json.dumps(table, indent=1) if args.json else markdown(table))
    if args.markdown:
        marked.put(args.markdown, MARK, markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
