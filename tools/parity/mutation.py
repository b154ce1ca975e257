"""How good the judge is: mutants it rejects and legal variants it accepts, by seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ops.contract import CONTRACTS
from ops.judge import golden_of, judge
from ops.mutants import LEGAL, MUTANTS, rounded_reference, samples_by_size

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Mutation:
    """Tried triples of mutant, type and seed by op; those that survived; legal cases by op and those rejected."""

    tried: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)
    judged: int = 0
    legal: Counter[str] = field(default_factory=Counter)
    false_alarms: list[str] = field(default_factory=list)

    def merge(self, other: Mutation) -> None:
        """Add what another run found."""
        self.tried += other.tried
        self.survivors += other.survivors
        self.judged += other.judged
        self.legal += other.legal
        self.false_alarms += other.false_alarms

    @property
    def total(self) -> int:
        """Mutants tried."""
        return self.tried.total()

    @property
    def legal_cases(self) -> int:
        """Legal cases judged."""
        return self.legal.total()

    @property
    def killed(self) -> int:
        """Mutants rejected, of `total`."""
        return self.total - len(self.survivors)

    def of_op(self, op: str) -> dict[str, int]:
        """Counts of one op."""
        survivors = sum(s.startswith(f"{op}:") for s in self.survivors)
        return {
            "mutants_total": self.tried[op],
            "mutants_killed": self.tried[op] - survivors,
            "legal_cases": self.legal[op],
            "false_alarms": sum(a.startswith(f"{op}:") for a in self.false_alarms),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"total": self.total, "killed": self.killed, "survivors": self.survivors, "legal_cases": self.legal_cases,
                "false_alarms": self.false_alarms}  # fmt: skip


def kill(op: str, seeds: Sequence[int], found: Mutation, step: Callable[[], object] = lambda: None) -> None:
    """Judge every mutant of `op` with each seed's samples, small ones first, until one sample rejects it."""
    contract = CONTRACTS[op]
    correct = rounded_reference(contract)
    for seed in seeds:
        for dtype in _DTYPES:
            left = [m for m in MUTANTS[op].values() if dtype in m.dtypes]
            found.tried[op] += len(left)
            for sample in samples_by_size(contract, dtype, seed):
                if not left:
                    break
                golden = golden_of(contract, sample)
                found.judged += len(left)
                left = [m for m in left if judge(contract, m.make(correct), sample, golden=golden).ok]
            found.survivors += [f"{m} {dtype} seed {seed}" for m in left]
        step()


def tolerate(op: str, seeds: Sequence[int], found: Mutation, step: Callable[[], object] = lambda: None) -> None:
    """Judge every legal variant of `op` on every sample of each seed."""
    contract = CONTRACTS[op]
    correct = rounded_reference(contract)
    for seed in seeds:
        for dtype in _DTYPES:
            variants = [v for v in LEGAL[op].values() if dtype in v.dtypes]
            for sample in contract.samples(dtype, seed) if variants else ():
                golden = golden_of(contract, sample)
                for v in variants:
                    verdict = judge(contract, v.make(correct), sample, golden=golden)
                    found.legal[op] += 1
                    if not verdict.ok:
                        found.false_alarms.append(f"{v} {dtype} seed {seed} {verdict}")
        step()
