"""What an op is: a Contract states its meaning once, implementations only make it faster.

A contract carries a reference in plain torch whose arithmetic type is an argument, the check of its
inputs, sample inputs, wrong inputs with the error they must raise, an error bound derived from the
arithmetic and its cost in operations and bytes. Backends attach implementations with `implement`;
choosing one is the registry's work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ops.probe import Probe

CONTRACTS: dict[str, Contract] = {}


@dataclass(frozen=True)
class Cost:
    """Work of one call: what a perfect implementation must at least compute and move.

    `matmul_flops` counts 2 per multiply-add of matrix products, `vector_flops` the elementwise rest,
    `bytes_read` and `bytes_written` each argument and result once (gathered rows once per reader).
    `rate` names the arithmetic of the products: "fp32", "bf16", "fp8", "fp4" or "int8".
    """

    matmul_flops: int = 0
    vector_flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    rate: str = "bf16"

    @property
    def bytes(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Sample:
    """One legal input. `tags` name its shape and value families ("zero", "odd", "ties", ...)."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrongInput:
    """One illegal input and a fragment (regular expression) of the ValueError it must raise."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    match: str


@dataclass(frozen=True)
class Impl:
    """One backend's implementation of a contract and the facts that decide whether it can be used.

    `dtypes`: activation types it accepts (empty: any). `soc`: chip names (empty: any). `needs`: names
    that the probe must know, for instance torch ops. `when`: a predicate over the call's arguments that
    reads shapes and dtypes only, never values. `name`: which of the backend's implementations this is, "" where it has one, or for the
    one that takes what the named ones refuse.
    """

    backend: str
    fn: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    soc: frozenset[str]
    needs: tuple[str, ...]
    when: Callable[..., bool] | None
    note: str
    name: str = ""

    @property
    def label(self) -> str:
        """How tables call it: its name, else its note, else its backend."""
        return self.name or self.note or self.backend

    def refusal(self, probe: Probe, dtype: torch.dtype) -> str | None:
        """The reason why this implementation cannot be bound here, or None when it can."""
        if self.soc and probe.soc not in self.soc:
            return f"needs SoC {', '.join(sorted(self.soc))}; found {probe.soc or 'none'}"
        if self.dtypes and dtype not in self.dtypes:
            return f"no kernel for {dtype}; has {', '.join(sorted(map(str, self.dtypes)))}"
        if gone := [n for n in self.needs if not probe.has(n)]:
            return f"missing {', '.join(gone)}" + (f": {probe.hint(gone)}" if probe.hint else "")
        return None


def _parameters(fn: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(fn).parameters.values() if p.name != "compute"]


@dataclass(eq=False)
class Contract:
    """The meaning of an op, written once.

    reference(*args, compute=dtype): plain torch; every floating result in `compute` precision, not rounded
        to the storage type; float64-clean. Its docstring is the op's documentation. Its signature (without
        `compute`) is the op's signature.
    meta(*args): checks shapes and dtypes (ValueError: found, expected, what to do) and returns the outputs as
        meta tensors of the right shape, strides and storage dtype.
    samples(dtype, seed): legal inputs. errors(dtype): wrong inputs.
    bound(sample_args..., golden=outputs): per floating output a tensor (or float) B; an implementation is right
        when |y - golden| <= u(y.dtype)*|golden| + B elementwise. Codes, scales and copies return B = 0.
    cost(*args): Cost of the call; reads metadata tensors (lengths) where needed, never data.
    mutates: names of arguments written. choices: positions of outputs that are choices (index sets).
    rms_share: largest RMS error of an output, besides its rounding, as a share of the RMS of its bound.
    version: raised when the same arguments get another meaning, so that older recordings are refused.
    compose(ops): builds the op from the bound ops named in `parts` (a fused op every backend can offer).
    """

    name: str
    reference: Callable[..., Any]
    meta: Callable[..., Any]
    samples: Callable[[torch.dtype, int], Iterator[Sample]]
    errors: Callable[[torch.dtype], Iterator[WrongInput]]
    bound: Callable[..., Any]
    cost: Callable[..., Cost]
    mutates: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()
    rms_share: float = 1 / 3
    compose: Callable[[Any], Callable[..., Any]] | None = None
    parts: tuple[str, ...] = ()
    version: int = 1
    impls: dict[str, Impl] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in CONTRACTS:
            raise ValueError(f"op {self.name!r} is declared twice; names of contracts are unique")
        names = {n for n, _, _ in _parameters(self.reference)}
        if unknown := set(self.mutates) - names:
            raise ValueError(f"op {self.name}: mutates names {sorted(unknown)}, which are no parameters of its reference")
        if (self.compose is None) != (not self.parts):
            raise ValueError(f"op {self.name}: compose and parts go together")
        CONTRACTS[self.name] = self

    def implement(
        self,
        backend: str,
        *,
        dtypes: Sequence[torch.dtype] = (),
        soc: Sequence[str] = (),
        needs: Sequence[str] = (),
        when: Callable[..., bool] | None = None,
        note: str = "",
        name: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a backend's implementation; refuses a second one and a differing signature (ValueError).

        A backend that has several gives each a `name`; they are tried in the order of registration, the one without a name last.
        """
        key = f"{backend}:{name}" if name else backend

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            if key in self.impls:
                raise ValueError(f"op {self.name}: backend {key!r} registered twice")
            if (found := _parameters(fn)) != (expected := _parameters(self.reference)):
                raise ValueError(
                    f"op {self.name}, backend {backend}: signature differs from the contract\n"
                    f"  found    {[f[0] for f in found]}\n  expected {[e[0] for e in expected]} (names, kinds and defaults)"
                )
            self.impls[key] = Impl(backend, fn, frozenset(dtypes), frozenset(soc), tuple(needs), when, note, name)
            return fn

        return add

    def candidates(self, backend: str) -> list[Impl]:
        """A backend's implementations in the order in which they are tried: named ones as registered, then the one without a name."""
        return sorted((i for i in self.impls.values() if i.backend == backend), key=lambda i: not i.name)


def tensors_bytes(*values: object) -> int:
    """Bytes of all tensors among `values` (None and scalars count 0)."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
