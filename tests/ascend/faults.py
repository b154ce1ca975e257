"""Planting faults at the calls of vendor ops: what an adapter passes or gets back is changed on its way, and the contract is judged.

Every fault is judged twice, without and with it: the same call must be right, and then wrong. `Fault.seen` says how: in the numbers, or
because the documented limits (or the vendor's model) refuse the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.ascend import indexer
from backends.ascend.limits import LimitError, enforced
from ops.contract import CONTRACTS, Sample
from ops.judge import Verdict, golden_of, judge
from ops.registry import on_device
from tests.ascend.bound import binding_of
from tests.ascend.conftest import HARDWARE
from tests.ascend.test_adapters_pitfalls import Change, _Altered, fresh_metadata

BF16 = torch.bfloat16
CHIPS, OLDER, NEWER = ("910b", "910_93", "950"), ("910b", "910_93"), ("950",)
Planted = Callable[[pytest.MonkeyPatch, ExitStack], None]
NUMBERS, REFUSED = "numbers", "refused"


@dataclass(frozen=True)
class Fault:
    """One fault: its name, the contract, how it is made, the sample, how it shows, the chips whose adapter it can be in."""

    name: str
    op: str
    plant: Planted
    sample: Callable[[], Sample]
    seen: str = NUMBERS
    socs: tuple[str, ...] = CHIPS


def call(op: str, change: Change, *, metadata: bool = False) -> Planted:
    """Other arguments for a vendor op, and for the op that makes its metadata, as an adapter that is wrong would pass to both."""

    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        stack.enter_context(_Altered(op, change))
        if metadata:
            stack.enter_context(_Altered(f"{op}_metadata", change))

    return plant


def index_call(change: Change) -> Planted:
    """Other arguments for the index choice and its metadata, which are Python functions of the vendor's package."""

    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        function = indexer._function
        patch.setattr(indexer, "_function", lambda name: lambda **kwargs: function(name)(**change(kwargs)))

    return plant


def index_result(change: Callable[[Tensor], Tensor]) -> Planted:
    """Another list of choices than the vendor's."""

    def plant(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        function = indexer._function

        def planted(name: str) -> Callable[..., Any]:
            def run(**kwargs: Any) -> Any:
                found = function(name)(**kwargs)
                return found if name.endswith("_metadata") else (change(found[0]), *found[1:])

            return run

        patch.setattr(indexer, "_function", planted)

    return plant


def piece(module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Planted:
    """A function that adapters are made of, replaced."""
    return lambda patch, stack: patch.setattr(module, name, wrap(getattr(module, name)))


def of(op: str, name: str) -> Callable[[], Sample]:
    """A sample of the contract by its name."""
    return lambda: next(s for s in CONTRACTS[op].samples(BF16, 0) if s.name == name)


@functools.cache
def prepared(fault: Fault) -> tuple[Sample, list[Tensor]]:
    """The sample and its float64 golden, made once for all chips."""
    sample = fault.sample()
    return sample, golden_of(CONTRACTS[fault.op], sample)


def judged(fault: Fault, soc: str, device: torch.device, planted: bool) -> Verdict:
    """The verdict on the adapter of a chip, with the documented limits enforced; raises what the limits and the models raise."""
    sample, golden = prepared(fault)
    contract, fn = CONTRACTS[fault.op], getattr(binding_of(soc, BF16, fault.op).ops, fault.op)
    fn = fn if device.type == "cpu" else on_device(fn, contract, device)
    with fresh_metadata(), pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.enter_context(enforced(soc))
        if planted:
            fault.plant(patch, stack)
        return judge(contract, fn, sample, golden=golden)


def check(fault: Fault, soc: str, device: torch.device) -> None:
    """Without the fault the call is right, by a vendor op; with it the fault is seen, in the way that it says."""
    if soc not in fault.socs:
        pytest.skip(f"the adapter of {fault.op} on {soc} has no such place")
    sample, _ = prepared(fault)
    label = binding_of(soc, BF16, fault.op).impl_of(fault.op, sample.args, sample.kwargs).label
    assert not label.startswith(("plain", "composed")), f"{fault.name}: the sample does not reach a vendor op, but {label}"
    clean = judged(fault, soc, device, False)
    assert clean.ok, str(clean)
    try:
        found = judged(fault, soc, device, True)
    except (LimitError, RuntimeError):
        if fault.seen != REFUSED:
            raise
        return
    # the vendor's models refuse what a device computes somehow
    assert fault.seen == NUMBERS or HARDWARE, f"{fault.name} is planted, and nothing refuses the call"
    assert not found.ok, f"{fault.name} is planted, and the judge does not see it"
