"""Ops bound for a chip as a test wants them, and their implementations judged on samples of the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from backends.ascend.limits import enforced
from backends.ascend.probe import registered
from ops.contract import CONTRACTS, Sample
from ops.judge import Verdict, judge
from ops.probe import Probe
from ops.registry import Binding, bind, load_backend, on_device


def probe_of(soc: str, without: Iterable[str] = ()) -> Probe:
    """A node with this chip and every package, except names that begin with one of `without`."""
    gone = tuple(without)
    return Probe(device="cpu", soc=soc, ask=lambda name: not name.startswith(gone) and registered(name) if gone else registered(name))


def binding_of(soc: str, dtype: torch.dtype, *ops: str, without: Iterable[str] = ()) -> Binding:
    """The ascend backend alone, bound for a chip."""
    load_backend("ascend")
    return bind(("ascend",), dtype=dtype, probes={"ascend": probe_of(soc, without)}, only=ops or None)


def judge_all(
    binding: Binding, op: str, samples: Iterable[Sample], soc: str, device: torch.device, *, limits: bool = True
) -> tuple[Counter[str], list[Verdict]]:
    """How many samples each implementation took, and the verdicts; vendor calls are held to their documented limits."""
    labels: Counter[str] = Counter()
    verdicts = []
    fn: Callable[..., Any] = getattr(binding.ops, op)
    fn = fn if device.type == "cpu" else on_device(fn, CONTRACTS[op], device)
    for sample in samples:
        labels[binding.impl_of(op, sample.args, sample.kwargs).label] += 1
        with enforced(soc) if limits else nullcontext():
            verdicts.append(judge(CONTRACTS[op], fn, sample))
    return labels, verdicts
