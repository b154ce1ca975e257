"""Judging the contracts' samples on backends: which combinations run, which are holes and why, and every case's verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ops.contract import CONTRACTS, Contract, Impl, Sample
from ops.judge import Verdict, golden_of, judge
from ops.mutants import Plant
from ops.probe import Probe
from ops.registry import chained, load_backend, on_device, usable

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {short: dtype for dtype, short in SHORT.items()}


@dataclass(frozen=True)
class Combination:
    """One cell of the coverage: an op on a backend, for an activation type and a chip (None: the one of this machine)."""

    op: str
    backend: str
    dtype: str
    soc: str | None

    def __str__(self) -> str:
        return f"{self.op} on {self.backend}, {self.dtype}" + (f", {self.soc}" if self.soc else "")


@dataclass(frozen=True)
class Case:
    """One judged call. `worst` is the largest error divided by its allowance."""

    where: Combination
    seed: int
    sample: str
    ok: bool
    worst: float
    problems: tuple[str, ...]

    @property
    def repeat(self) -> str:
        """The command that judges this case again, alone."""
        soc = f" --soc {self.where.soc}" if self.where.soc else ""
        head = f"v4 parity --op {self.where.op} --backend {self.where.backend} --dtype {self.where.dtype}{soc}"
        return f"{head} --seed {self.seed} --sample {self.sample} --mutant-seeds 0"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; `worst` is null where it is not finite."""
        worst = self.worst if self.worst < float("inf") else None
        return {**vars(self.where), "seed": self.seed, "sample": self.sample, "ok": self.ok, "worst": worst,
                "problems": list(self.problems), "repeat": self.repeat}  # fmt: skip


@dataclass
class Outcome:
    """Everything a run found: judged cases, and per hole the reason."""

    cases: list[Case] = field(default_factory=list)
    holes: dict[Combination, str] = field(default_factory=dict)

    def merge(self, other: Outcome) -> None:
        """Add what another run found."""
        self.cases += other.cases
        self.holes |= other.holes

    @property
    def failures(self) -> list[Case]:
        """Cases whose verdict is wrong, the worst first."""
        return sorted((c for c in self.cases if not c.ok), key=lambda c: -c.worst)


@dataclass(frozen=True)
class Candidate:
    """What a backend runs for a combination: the function, its shape rule, and where its tensors live."""

    fn: Callable[..., Any]
    when: Callable[..., bool] | None
    device: torch.device


def candidate(contract: Contract, backend: str, probe: Probe, dtype: torch.dtype) -> Candidate | str:
    """What `backend` runs for the op, or the reason why it has nothing."""
    module = load_backend(backend)
    device = torch.device(module.DEVICE)
    own, refused = usable(contract, backend, probe, dtype)
    why = "not written"
    if contract.compose is not None and (not own or own[-1].when is not None):
        composed = _composed(contract, backend, probe, dtype)
        if isinstance(composed, str):
            why = composed
        else:
            own.append(Impl(backend, composed, frozenset(), frozenset(), (), None, "composed"))
    if not own:
        return "; ".join(refused) or why
    fn = own[0].fn if len(own) == 1 else chained(own, contract.reference)
    when = None if own[-1].when is None else lambda *args, **kwargs: any(i.when is None or i.when(*args, **kwargs) for i in own)
    return Candidate(fn if device.type == "cpu" else on_device(fn, contract, device), when, device)


def _composed(contract: Contract, backend: str, probe: Probe, dtype: torch.dtype) -> Callable[..., Any] | str:
    """The op made of the backend's own parts, or why it can not be."""
    assert contract.compose is not None
    parts = {}
    for part in contract.parts:
        own, _ = usable(CONTRACTS[part], backend, probe, dtype)
        if not own or own[-1].when is not None:
            return f"not written, and its part {part} does not take every input"
        parts[part] = own[0].fn if len(own) == 1 else chained(own, CONTRACTS[part].reference)
    return contract.compose(SimpleNamespace(**parts))


def socs_of(module: Any, wanted: Sequence[str]) -> tuple[str | None, ...]:
    """Chips to look at: this machine's, or where it has none, those asked for or all that the backend knows.

    ValueError for another chip than the one that is here: its kernels would not run.
    """
    own: tuple[str, ...] = getattr(module, "SOCS", ())
    if not own:
        return (None,)
    here = module.probe().soc
    if here is None:
        return tuple(s for s in own if not wanted or s in wanted)
    if other := [s for s in wanted if s in own and s != here]:
        raise ValueError(f"--soc {','.join(other)}: the chip of this machine is {here}; leave --soc out, or run there")
    return (here,)


def combinations(backends: Sequence[str], ops: Sequence[str], dtypes: Sequence[str], socs: Sequence[str]) -> list[Combination]:
    """Cells of the coverage, in the order they are run."""
    return [
        Combination(op, backend, dtype, soc)
        for backend in backends
        for soc in socs_of(load_backend(backend), socs)
        for op in ops
        for dtype in dtypes
    ]


def _probe(where: Combination) -> Probe:
    found: Probe = load_backend(where.backend).probe()
    return found if where.soc is None else replace(found, soc=where.soc)


def _rounds(contract: Contract, dtype: torch.dtype, seed: int, only: str | None) -> Iterator[tuple[int, list[Sample]]]:
    while True:
        yield seed, [s for s in contract.samples(dtype, seed) if only in (None, s.name)]
        seed += 1


def judge_combination(
    where: Combination,
    outcome: Outcome,
    *,
    seed: int,
    at_least: int,
    sample: str | None = None,
    plant: Plant | None = None,
    against: str | None = None,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Judge at least `at_least` samples of one combination (whole seeds), or note why it is a hole.

    sample: only the one of this name, of one seed. plant: a fault to put in. against: judge another backend's results on the same
    cases too (its cases carry its own name). `step` is called after each case.
    """
    contract, dtype = CONTRACTS[where.op], TYPES[where.dtype]
    found = candidate(contract, where.backend, _probe(where), dtype)
    if isinstance(found, str):
        outcome.holes[where] = found
        return
    runs = [(where, found)]
    if against is not None and against != where.backend:
        other = replace(where, backend=against, soc=None)
        second = candidate(contract, against, _probe(other), dtype)
        if isinstance(second, str):
            outcome.holes[other] = second
        else:
            runs.append((other, second))
    done = 0
    for s, samples in _rounds(contract, dtype, seed, sample):
        before = done
        for one in samples:
            able = [(w, c) for w, c in runs if c.when is None or c.when(*one.args, **one.kwargs)]
            if not able or able[0][0] != where:
                continue
            golden = golden_of(contract, one)
            for w, c in able:
                fn = plant.variant.make(c.fn) if plant and w == where and plant.variant.op == w.op else c.fn
                outcome.cases.append(_case(w, s, _judged(contract, fn, one, golden)))
                step()
            done += 1
        if done == before:
            outcome.holes[where] = f"no sample named {sample}" if sample else "no sample meets its shape rule"
            return
        if done >= at_least or sample:
            return


# what a vendor's op raises when it can not run, and what a wrapper does with a wrong answer of it
_CRASHES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def _judged(contract: Contract, fn: Callable[..., Any], sample: Sample, golden: list[Tensor]) -> Verdict:
    """The verdict; an implementation that raises is wrong there, and the others are still judged."""
    try:
        return judge(contract, fn, sample, golden=golden)
    except _CRASHES as error:
        return Verdict(contract.name, sample.name, False, float("inf"), (f"raised {type(error).__name__}: {str(error)[:2000]}",))


def _case(where: Combination, seed: int, verdict: Verdict) -> Case:
    return Case(where, seed, verdict.sample, verdict.ok, verdict.worst, verdict.problems)
