"""Choosing implementations: once, before the first forward, with a reason for every refusal.

`bind` walks a chain of backends and returns plain functions. Nothing is looked up per call and nothing is caught
and retried: a missing kernel is either a listed step down the chain or NoImplementation.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ops.contract import CONTRACTS, Contract, Impl
from ops.probe import Probe


class NoImplementation(RuntimeError):
    """No backend of the chain implements an op for every input; the message lists each backend's reason."""


@dataclass(frozen=True)
class Choice:
    """How one op was decided: the backends used in order of preference and every backend's note."""

    op: str
    used: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form: op, used, notes by backend."""
        return {"op": self.op, "used": list(self.used), "notes": dict(self.notes)}


@dataclass(frozen=True)
class Binding:
    """Bound functions (`ops.rms_norm(...)`) and the reasons behind them."""

    ops: SimpleNamespace
    choices: tuple[Choice, ...]
    chain: tuple[str, ...]
    impls: Mapping[str, tuple[Impl, ...]] = field(default_factory=dict, repr=False)

    def backend_of(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The backend that runs this call: the first of the op's implementations whose shape rule takes it."""
        return self.impl_of(op, args, kwargs).backend

    def impl_of(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Impl:
        """The implementation that runs this call: the first one whose shape rule takes it."""
        return next(i for i in self.impls[op] if i.when is None or i.when(*args, **kwargs))

    def explain(self) -> str:
        """Table of op, implementation used, and each refusal."""
        width = max((len(c.op) for c in self.choices), default=2)
        lines = [f"{'op':<{width}}  used"]
        for c in self.choices:
            told = "; ".join(f"{b}: {r}" for b, r in c.notes if b not in c.used or not r.startswith("used"))
            lines.append(f"{c.op:<{width}}  {' -> '.join(c.used)}" + (f"   ({told})" if told else ""))
        return "\n".join(lines)

    def table(self) -> list[dict[str, Any]]:
        """The same as JSON-ready rows."""
        return [c.as_dict() for c in self.choices]


def load_backend(name: str) -> ModuleType:
    """Import `backends.<name>`, which registers its implementations. ValueError lists the known backends."""
    known = importlib.import_module("backends").NAMES
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(sorted(known))}{hint}")
    return importlib.import_module(f"backends.{name}")


def unavailable(name: str) -> str | None:
    """Why a backend can not run on this machine, or None. ValueError for an unknown backend."""
    ask: Callable[[], str | None] = getattr(load_backend(name), "unavailable", lambda: None)
    return ask()


def chain_of(backend: str, *, strict: bool = False, batch_invariant: bool = False) -> tuple[str, ...]:
    """Backend names in order of preference: the backend with the one in front of it, then plain torch unless `strict`."""
    if batch_invariant:
        return (f"{backend}_invariant",)
    front_of = importlib.import_module("backends").IN_FRONT
    base = next((b for b, front in front_of.items() if front == backend), backend)
    own = (front_of[base], base) if base in front_of else (base,)
    return own if strict or base == "cpu" else (*own, "cpu")


def parse_overrides(text: str) -> dict[str, str]:
    """Read `op=backend,op=backend` (the form of V4_OPS). ValueError names a malformed item."""
    result: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, eq, backend = item.partition("=")
        if not eq or not op.strip() or not backend.strip():
            raise ValueError(f"V4_OPS: found {item!r}, expected op=backend, for instance rms_norm=cpu")
        result[op.strip()] = backend.strip()
    return result


def _check_overrides(overrides: Mapping[str, str]) -> None:
    for op in overrides:
        if op not in CONTRACTS:
            near = difflib.get_close_matches(op, CONTRACTS, 1)
            raise ValueError(f"override for unknown op {op!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def chained(impls: Sequence[Impl], reference: Callable[..., Any]) -> Callable[..., Any]:
    """One function of several implementations: the first whose shape rule takes the call runs it."""
    pairs = [(i.when, i.fn) for i in impls]

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        for when, fn in pairs:
            if when is None or when(*args, **kwargs):
                return fn(*args, **kwargs)
        raise AssertionError("unreachable: bind requires a last implementation without a shape rule")

    return call


def _checked(contract: Contract, fn: Callable[..., Any], checks: Sequence[Callable[[], AbstractContextManager[None]]]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        contract.meta(*args, **kwargs)
        with ExitStack() as stack:
            for check in checks:
                stack.enter_context(check())
            return fn(*args, **kwargs)

    return call


def usable(contract: Contract, backend: str, probe: Probe, dtype: torch.dtype) -> tuple[list[Impl], list[str]]:
    """The backend's implementations that can be bound, up to the first that takes every call, and the reasons of those before it that can not."""
    found: list[Impl] = []
    refused: list[str] = []
    for impl in contract.candidates(backend):
        if (reason := impl.refusal(probe, dtype)) is not None:
            refused.append(f"{impl.name}: {reason}" if impl.name else reason)
            continue
        found.append(impl)
        if impl.when is None:
            break
    return found, refused


def _note(own: Sequence[Impl], refused: Sequence[str]) -> str:
    """What a backend answers for an op: what runs, under which condition, and why the rest does not."""
    if not own:
        return "; ".join(refused) or "not written"
    if len(own) == 1 and not own[0].name:
        used = own[0].note or ("used" if own[0].when is None else "used where its shape rule holds")
    else:
        used = ", else ".join(i.label + (f" [{i.note}]" if i.name and i.note else "") + (" where its shape rule holds" if i.when else "") for i in own)
    return used + (f" ({'; '.join(refused)})" if refused else "")


def _choose(
    contract: Contract,
    order: Sequence[str],
    probes: Mapping[str, Probe],
    dtype: torch.dtype,
    ops: SimpleNamespace,
    chosen: Mapping[str, Choice],
) -> tuple[list[Impl], Choice]:
    found: list[Impl] = []
    notes: list[tuple[str, str]] = []

    def decided() -> tuple[list[Impl], Choice]:
        return found, Choice(contract.name, tuple(dict.fromkeys(i.backend for i in found)), tuple(notes))

    for backend in order:
        own, refused = usable(contract, backend, probes[backend], dtype)
        if (not own or own[-1].when is not None) and contract.compose and all(chosen[p].used == (backend,) for p in contract.parts):
            fn = contract.compose(SimpleNamespace(**{p: getattr(ops, p) for p in contract.parts}))
            own.append(Impl(backend, fn, frozenset(), frozenset(), (), None, f"composed of {', '.join(contract.parts)}"))
        notes.append((backend, _note(own, refused)))
        found += own
        if own and own[-1].when is None:
            return decided()
    if contract.compose:
        # no backend has all of it alone: the parts as they are bound, whichever backends they come from
        fn = contract.compose(SimpleNamespace(**{p: getattr(ops, p) for p in contract.parts}))
        of = next((b for b in order if all(b in chosen[p].used for p in contract.parts)), order[-1])
        found.append(Impl(of, fn, frozenset(), frozenset(), (), None, f"composed of {', '.join(contract.parts)}"))
        return decided()
    listing = "\n".join(f"  {b:14s} {r}" for b, r in notes)
    raise NoImplementation(
        f"{contract.name}: no implementation takes every input for {dtype}\n{listing}\n"
        "  Add a backend to the chain, override the op, or drop --strict."
    )


def bind(
    chain: Sequence[str],
    *,
    dtype: torch.dtype,
    probes: Mapping[str, Probe] | None = None,
    overrides: Mapping[str, str] | None = None,
    checked: bool = False,
    only: Sequence[str] | None = None,
) -> Binding:
    """Choose an implementation per op, now.

    chain: backend names in order of preference. dtype: activation type. probes: per backend, instead of looking at
    this machine. overrides: op -> backend, above the chain; V4_OPS in the environment is used for ops not named here.
    checked: validate every call against the contract first, inside the backends' own `checks(probe)`. only: bind just
    these ops (with their parts).
    Raises NoImplementation with every backend's reason, ValueError for unknown backends or ops and for a backend that can not run here.
    """
    pinned = {**parse_overrides(os.environ.get("V4_OPS", "")), **(overrides or {})}
    names = list(dict.fromkeys([*chain, *pinned.values()]))
    modules = {name: load_backend(name) for name in names}
    _check_overrides(pinned)
    for name in names:
        if name not in (probes or {}) and (why := unavailable(name)):
            raise ValueError(f"backend {name!r} can not run here: {why}")
    known = {name: (probes or {}).get(name) or modules[name].probe() for name in names}
    checks = [functools.partial(modules[n].checks, known[n]) for n in names if checked and hasattr(modules[n], "checks")]
    ops = SimpleNamespace()
    chosen: dict[str, Choice] = {}
    bound: dict[str, tuple[Impl, ...]] = {}
    names_wanted = dict.fromkeys(n for op in only or CONTRACTS for n in (*CONTRACTS[op].parts, op))
    wanted = [CONTRACTS[n] for n in names_wanted]
    for contract in sorted(wanted, key=lambda c: bool(c.parts)):
        order = (pinned[contract.name],) if contract.name in pinned else tuple(chain)
        impls, choice = _choose(contract, order, known, dtype, ops, chosen)
        fn = impls[0].fn if len(impls) == 1 else chained(impls, contract.reference)
        setattr(ops, contract.name, _checked(contract, fn, checks) if checked else fn)
        chosen[contract.name], bound[contract.name] = choice, tuple(impls)
    return Binding(ops, tuple(chosen[n] for n in sorted(chosen)), tuple(chain), bound)


def signature(contract: Contract) -> inspect.Signature:
    """The op's public signature: that of its reference without `compute`."""
    full = inspect.signature(contract.reference)
    return full.replace(parameters=[p for p in full.parameters.values() if p.name != "compute"])


def on_device(fn: Callable[..., Any], contract: Contract, device: torch.device) -> Callable[..., Any]:
    """`fn` on tensors of another device: arguments go there, results and written arguments come back."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature(contract).bind(*args, **kwargs)
        moved = {name: there(value) for name, value in bound.arguments.items()}
        here = dict(bound.arguments)
        bound.arguments.update(moved)
        found = fn(*bound.args, **bound.kwargs)
        for name, value in here.items():
            if isinstance(value, Tensor):
                value.copy_(moved[name])
        if found is None:
            return None
        return found.cpu() if isinstance(found, Tensor) else tuple(f.cpu() for f in found)

    return call
