"""Faults on purpose: variants of an op that a judge must reject, and legal variants that it must accept.

A variant is a function `body(call, ...)` with the op's own parameters behind `call`, the correct implementation: it changes what
goes in, what comes out, or does the work itself. So every variant can be planted on any backend, in a test or in a whole model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ops.contract import CONTRACTS, Contract, Sample, tensors_bytes
from ops.registry import signature

Function = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One way of computing an op differently. `dtypes`: activation types for which it differs (a mutant must be rejected for each)."""

    op: str
    name: str
    what: str
    body: Function
    dtypes: tuple[torch.dtype, ...]

    def make(self, correct: Function) -> Function:
        """The variant over a correct implementation, with the op's signature."""
        return functools.wraps(correct)(functools.partial(self.body, correct))

    def __str__(self) -> str:
        return f"{self.op}:{self.name}"


MUTANTS: dict[str, dict[str, Variant]] = {}
LEGAL: dict[str, dict[str, Variant]] = {}
BOTH = (torch.float32, torch.bfloat16)


def _check_parameters(op: str, name: str, body: Function) -> None:
    if op not in CONTRACTS:
        raise ValueError(f"variant {op}:{name}: there is no op {op!r}")
    found = list(inspect.signature(body).parameters.values())[1:]
    if [p.kind for p in found] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return
    expected = [p for p in inspect.signature(CONTRACTS[op].reference).parameters if p != "compute"]
    if [p.name for p in found] != expected:
        raise ValueError(f"variant {op}:{name}: parameters are {[p.name for p in found]}, expected call and {expected}")


def _register(
    table: dict[str, dict[str, Variant]], ops: str | Sequence[str], name: str, what: str, dtypes: Sequence[torch.dtype]
) -> Callable[[Function], Function]:
    def add(body: Function) -> Function:
        for op in [ops] if isinstance(ops, str) else ops:
            _check_parameters(op, name, body)
            if name in table.setdefault(op, {}):
                raise ValueError(f"variant {op}:{name} is declared twice")
            table[op][name] = Variant(op, name, what, body, tuple(dtypes))
        return body

    return add


def mutant(
    ops: str | Sequence[str], name: str, what: str, *, dtypes: Sequence[torch.dtype] = BOTH
) -> Callable[[Function], Function]:
    """Declare a fault of one op or of several with the same parameters; `what` says what went wrong, as in a bug report."""
    return _register(MUTANTS, ops, name, what, dtypes)


def legal(
    ops: str | Sequence[str], name: str, what: str, *, dtypes: Sequence[torch.dtype] = BOTH
) -> Callable[[Function], Function]:
    """Declare a variant that the contract allows."""
    return _register(LEGAL, ops, name, what, dtypes)


def rounded_reference(contract: Contract, compute: torch.dtype = torch.float32) -> Function:
    """The contract's reference with results rounded to their storage types: the plainest correct implementation."""

    def call(*args: Any, **kwargs: Any) -> Any:
        shapes = contract.meta(*args, **kwargs)
        found = contract.reference(*args, compute=compute, **kwargs)
        if found is None or isinstance(found, torch.Tensor):
            return found if found is None else found.to(shapes.dtype)
        return tuple(f.to(s.dtype) for f, s in zip(found, shapes, strict=True))

    return call


def size(sample: Sample) -> int:
    """Bytes of all tensors of a sample."""
    return tensors_bytes(*sample.args, *sample.kwargs.values())


def samples_by_size(contract: Contract, dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """The contract's samples, small ones first."""
    yield from sorted(contract.samples(dtype, seed), key=size)


def arguments(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults included."""
    bound = signature(CONTRACTS[op]).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
