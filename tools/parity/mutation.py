"""How good the judge is: mutants it rejects and legal variants it accepts, by seed."""

from __future__ import annotations

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
    """Tried pairs of mutant, type and seed; those that survived; legal cases and those rejected."""

    total: int = 0
    survivors: list[str] = field(default_factory=list)
    judged: int = 0
    legal_cases: int = 0
    false_alarms: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """Mutants rejected, of `total`."""
        return self.total - len(self.survivors)

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
            found.total += len(left)
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
                    found.legal_cases += 1
                    if not verdict.ok:
                        found.false_alarms.append(f"{v} {dtype} seed {seed} {verdict}")
        step()
