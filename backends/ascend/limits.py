"""Documented limits of the vendor's ops, enforced on every call while a block of code runs (the vendor's host code checks almost nothing).

The limits are data: contracts.yaml, whose head describes the grammar. Nothing here runs unless a block asks for it: v4 with --checked does,
and the tests.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends.ascend import expressions
from backends.ascend.expressions import Unbound, evaluate

FILE = Path(__file__).with_name("contracts.yaml")


class LimitError(ValueError):
    """A call of a vendor op outside its documented limits."""


class Condition(NamedTuple):
    """One requirement: expression, message, chips it holds for (empty: all), and when it applies (None: always)."""

    that: ast.expr
    says: str
    only: frozenset[str]
    given: ast.expr | None


class Pattern(NamedTuple):
    """Types and shapes of one argument. `kinds`: (type, chips); `same_as`: argument whose type it must have; `shapes`: alternatives."""

    kinds: tuple[tuple[str, frozenset[str]], ...]
    same_as: str | None
    shapes: tuple[tuple[str, ...], ...]


class Limits(NamedTuple):
    """What contracts.yaml says about one op."""

    op: str
    chips: frozenset[str]
    explicit: tuple[str, ...]
    layout: Mapping[str, Pattern]
    require: tuple[Condition, ...]
    values: tuple[Condition, ...]
    source: str
    package: str
    evidence: str
    schema: str | None


def _chips(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _pattern(text: str) -> Pattern:
    kinds, _, shapes = text.partition(" ")
    alternatives = tuple(_dims(s.strip()) for s in shapes.split(" | ")) if shapes else ()
    if kinds.startswith("="):
        return Pattern((), kinds[1:], alternatives)
    if kinds == "any":
        return Pattern((), None, alternatives)
    pairs = (k.partition("@") for k in kinds.split("|"))
    return Pattern(tuple((name, _chips(chips)) for name, _, chips in pairs), None, alternatives)


def _dims(text: str) -> tuple[str, ...]:
    inner = text.strip().removeprefix("[").removesuffix("]")
    return tuple(d.strip() for d in inner.split(",")) if inner.strip() else ()


def _conditions(rows: list[dict[str, Any]] | None) -> tuple[Condition, ...]:
    return tuple(
        Condition(
            expressions.parse(str(row["that"])),
            row["says"],
            frozenset(map(str, row.get("only", ()))),
            expressions.parse(str(row["if"])) if "if" in row else None,
        )
        for row in rows or ()
    )


@functools.cache
def limits() -> dict[str, Limits]:
    """Every op of contracts.yaml. ValueError names an entry that can not be read."""
    found: dict[str, Limits] = {}
    for op, entry in yaml.safe_load(FILE.read_text(encoding="utf-8"))["ops"].items():
        try:
            found[op] = Limits(
                op,
                frozenset(map(str, entry["chips"])),
                tuple(entry.get("explicit", ())),
                {name: _pattern(text) for name, text in (entry.get("layout") or {}).items()},
                _conditions(entry.get("require")),
                _conditions(entry.get("values")),
                str(entry["source"]),
                entry["package"],
                str(entry["evidence"]),
                entry.get("schema"),
            )
        except (KeyError, SyntaxError, AttributeError) as error:
            raise ValueError(f"{FILE.name}: entry {op}: {error}") from error
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_type(where: str, tensor: Tensor, pattern: Pattern, arguments: Mapping[str, Any], soc: str | None) -> None:
    found = _short(tensor.dtype)
    if pattern.same_as is not None:
        other = arguments.get(pattern.same_as)
        if isinstance(other, Tensor) and other.dtype != tensor.dtype:
            raise LimitError(f"{where} is {found}, documented: the type of {pattern.same_as}, {_short(other.dtype)}")
    elif pattern.kinds and not any(found == kind and (not chips or soc in chips) for kind, chips in pattern.kinds):
        wanted = " or ".join(kind + (f" (on {', '.join(sorted(chips))})" if chips else "") for kind, chips in pattern.kinds)
        raise LimitError(f"{where} is {found}, documented: {wanted}")


def _fits(shape: tuple[int, ...], dims: tuple[str, ...], names: dict[str, Any]) -> dict[str, Any] | None:
    """Names bound by this shape, or None when it does not fit."""
    new: dict[str, Any] = {}
    if dims[:1] == ("...",):
        dims = dims[1:]
        if len(shape) < len(dims):
            return None
        shape = shape[len(shape) - len(dims) :]
    if len(shape) != len(dims):
        return None
    for size, dim in zip(shape, dims, strict=True):
        known = {**names, **new}
        if dim == "_":
            continue
        if dim.isidentifier() and dim not in known:
            new[dim] = size
        elif dim.isidentifier() or dim.isdigit():
            if size != (int(dim) if dim.isdigit() else known[dim]):
                return None
        else:
            try:
                wanted = evaluate(expressions.parse(dim), known)
            except Unbound:
                continue
            if size != wanted:
                return None
    return new


def _check_layout(entry: Limits, arguments: Mapping[str, Any], soc: str | None) -> dict[str, Any]:
    numbers = {name: value for name, value in arguments.items() if isinstance(value, int)}
    names: dict[str, Any] = {}
    for argument, pattern in entry.layout.items():
        given = arguments.get(argument)
        tensors = given if isinstance(given, (list, tuple)) else [given]
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                continue
            where = f"{entry.op}: {argument}" + (f"[{i}]" if isinstance(given, (list, tuple)) else "")
            _check_type(where, tensor, pattern, arguments, soc)
            if not pattern.shapes:
                continue
            held = {**names, **numbers}
            bound = next((b for s in pattern.shapes if (b := _fits(tuple(tensor.shape), s, held)) is not None), None)
            if bound is None:
                wanted = " or ".join(f"[{', '.join(s)}]" for s in pattern.shapes)
                sizes = ", ".join(f"{k} = {v}" for k, v in names.items())
                raise LimitError(f"{where} has shape {list(tensor.shape)}, documented: {wanted}" + (f" with {sizes}" if sizes else ""))
            names.update(bound)
    return names


def _holds(condition: Condition, names: Mapping[str, Any], soc: str | None) -> bool:
    if condition.only and soc not in condition.only:
        return True
    try:
        return (condition.given is not None and not evaluate(condition.given, names)) or bool(evaluate(condition.that, names))
    except Unbound:
        return True


def check(op: str, passed: Mapping[str, Any], defaults: Mapping[str, Any], soc: str | None, *, values: bool = True) -> None:
    """Whether a call of `op` ("npu::npu_rms_norm") keeps to what is documented. LimitError says what was found and what is documented.

    passed: the arguments as the call site gave them; defaults: the vendor's, for the others. values: also what needs data (waits for the
    device). An op that contracts.yaml does not know is an error too.
    """
    entry = limits().get(op)
    if entry is None:
        raise LimitError(f"{op}: not in {FILE.name}: its limits must be written down before it is called")
    if soc is not None and soc not in entry.chips:
        raise LimitError(f"{op}: called on {soc}, documented for {', '.join(sorted(entry.chips))}")
    if silent := [name for name in entry.explicit if name not in passed]:
        raise LimitError(f"{op}: {', '.join(silent)} left to the vendor's default, which is wrong for this model or differs between packages")
    arguments = {**defaults, **passed}
    names = {**_check_layout(entry, arguments, soc), **arguments}
    for condition in (*entry.require, *(entry.values if values else ())):
        if not _holds(condition, names, soc):
            found = ", ".join(_told(k, v) for k, v in arguments.items() if k in expressions.names(condition.that))
            raise LimitError(f"{op}: {condition.says}" + (f"; found {found}" if found else "") + f" (notes: section {entry.source})")


def _told(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{name} {_short(value.dtype)} {list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return f"{name} [{', '.join(_told('', v).strip() for v in value)}]"
    return f"{name} {value!r}"


class _Enforce(TorchFunctionMode):
    """Sees calls of torch.ops as they were written, before torch drops arguments that equal their default."""

    def __init__(self, soc: str | None, values: bool) -> None:
        super().__init__()
        self._soc, self._values = soc, values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func if isinstance(func, torch._ops.OpOverloadPacket) else getattr(func, "overloadpacket", None)
        name = packet._qualified_op_name if packet is not None else ""
        if packet is not None and name.partition("::")[0] in NAMESPACES:
            schema = packet.default._schema
            passed = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            check(name, passed, {a.name: a.default_value for a in schema.arguments if a.has_default_value()}, self._soc, values=self._values)
        return func(*args, **kwargs)


NAMESPACES = frozenset({"npu", "custom", "cann_ops_transformer", "_C_ascend", "v4_ascend"})
_active: list[_Enforce] = []


@contextmanager
def enforced(soc: str | None, *, values: bool = True) -> Iterator[None]:
    """Check every call of a vendor op inside the block against contracts.yaml; a call outside its limits raises LimitError."""
    mode = _Enforce(soc, values)
    _active.append(mode)
    try:
        with mode:
            yield
    finally:
        _active.pop()


def python_call(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A vendor function without a schema, called by keyword: checked like the others while limits are enforced."""
    if not _active:
        return call
    mode = _active[-1]

    @functools.wraps(call)
    def checked(**kwargs: Any) -> Any:
        check(name, kwargs, {}, mode._soc, values=mode._values)
        return call(**kwargs)

    return checked


