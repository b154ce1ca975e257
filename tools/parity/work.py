"""The work of a parity run in independent units, one after another or shared by several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from ops.mutants import Plant
from tools.parity.cases import Combination, Outcome, judge_combination
from tools.parity.mutation import Mutation, kill, tolerate


@dataclass(frozen=True)
class Cases:
    """Cases of one cell of the coverage; arguments as of `judge_combination`, the plant as text."""

    where: Combination
    seed: int
    at_least: int
    sample: str | None
    plant: str | None
    against: str | None

    @property
    def size(self) -> int:
        """Steps of the progress bar."""
        return self.at_least

    def run(self, outcome: Outcome, mutation: Mutation, step: Callable[[], object]) -> None:
        """Judge them."""
        plant = Plant.parse(self.plant) if self.plant else None
        judge_combination(
            self.where, outcome, seed=self.seed, at_least=self.at_least, sample=self.sample, plant=plant, against=self.against,
            step=step,
        )  # fmt: skip


@dataclass(frozen=True)
class Variants:
    """Every mutant of an op (legal False) or every legal variant on the samples of one seed."""

    op: str
    seed: int
    legal: bool

    size = 1

    def run(self, outcome: Outcome, mutation: Mutation, step: Callable[[], object]) -> None:
        """Judge them."""
        (tolerate if self.legal else kill)(self.op, (self.seed,), mutation, step)


Unit = Cases | Variants


def _alone(unit: Unit) -> tuple[Outcome, Mutation]:
    outcome, mutation = Outcome(), Mutation()
    unit.run(outcome, mutation, lambda: None)
    return outcome, mutation


def _shared(units: Sequence[Unit], jobs: int, threads: int) -> Iterator[tuple[Unit, Outcome, Mutation]]:
    # a forked child of a process whose threads have run may hang in them
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(_alone, unit) for unit in units]
        try:
            for unit, future in zip(units, futures, strict=True):
                yield unit, *future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def perform(units: Sequence[Unit], jobs: int, threads: int, step: Callable[[int], object]) -> tuple[Outcome, Mutation]:
    """Do all units; the same result, in the same order, whatever the number of processes. `step(n)`: n more steps are done."""
    outcome, mutation = Outcome(), Mutation()
    if jobs == 1:
        for unit in units:
            unit.run(outcome, mutation, lambda: step(1))
        return outcome, mutation
    for unit, more, tried in _shared(units, jobs, threads):
        outcome.merge(more)
        mutation.merge(tried)
        step(unit.size)
    return outcome, mutation
