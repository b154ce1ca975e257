"""The expressions of contracts.yaml: a subset of Python over shapes, types and plain arguments, evaluated without eval."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Unbound(LookupError):
    """A name that this call gives no value: the condition says nothing about it."""


def _low(t: Tensor) -> int:
    return int(t.min()) if t.numel() else 0


def _high(t: Tensor) -> int:
    return int(t.max()) if t.numel() else 0


def _distinct(t: Tensor) -> bool:
    kept = t[t >= 0]
    return kept.unique().numel() == kept.numel()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "given": lambda a: a is not None,
    "dim": lambda t: t.dim(),
    "size": lambda t, i: t.shape[i],
    "numel": lambda t: t.numel(),
    "type": lambda t: str(t.dtype).removeprefix("torch."),
    "contiguous": lambda t: t.is_contiguous(),
    "count": len,
    "all_sizes": lambda tensors, i: [t.shape[i] for t in tensors],
    "ceil_div": lambda a, b: -(-a // b),
    "finite": lambda x: math.isfinite(x),
    "power_of_two": lambda n: n > 0 and n & (n - 1) == 0,
    "equal": lambda a, b: a.shape == b.shape,
    "low": _low,
    "high": _high,
    "total": lambda t: int(t.sum()),
    "rising": lambda t: bool((t.diff() >= 0).all()),
    "distinct": _distinct,
    "abs": abs,
    "min": min,
    "max": max,
}
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


@functools.cache
def parse(text: str) -> ast.expr:
    """The expression as a tree. SyntaxError when it is none, or uses what is not in the subset."""
    tree = ast.parse(text.strip(), mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords):
            raise SyntaxError(f"{text!r}: calls something else than {', '.join(sorted(FUNCTIONS))}")
        if not isinstance(node, _ALLOWED):
            raise SyntaxError(f"{text!r}: {type(node).__name__} is not in the subset")
    return tree


_ALLOWED = (
    ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Compare,
    ast.Call, ast.operator, ast.cmpop, ast.IfExp, ast.Subscript,
)  # fmt: skip


@functools.cache
def _names(tree: ast.expr) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)) - frozenset(FUNCTIONS)


def names(tree: ast.expr) -> frozenset[str]:
    """Names that an expression reads."""
    return _names(tree)


def _value(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise Unbound(name)
    return known[name]


def _may_be_none(tree: ast.expr) -> bool:
    return isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "given"


def evaluate(tree: ast.expr, known: Mapping[str, Any]) -> Any:
    """Value of an expression of `parse`. Unbound when it needs a name that is absent, or computes with an argument that is None."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        return _value(tree.id, known)
    if isinstance(tree, (ast.List, ast.Tuple)):
        return tuple(evaluate(item, known) for item in tree.elts)
    if isinstance(tree, ast.BoolOp):
        return _logic(tree, known)
    if isinstance(tree, ast.UnaryOp):
        value = evaluate(tree.operand, known)
        return not value if isinstance(tree.op, ast.Not) else -_number(value)
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_number(evaluate(tree.left, known)), _number(evaluate(tree.right, known)))
    if isinstance(tree, ast.Compare):
        return _compare(tree, known)
    if isinstance(tree, ast.Subscript):
        return _number(evaluate(tree.value, known))[evaluate(tree.slice, known)]
    if isinstance(tree, ast.IfExp):
        return evaluate(tree.body if evaluate(tree.test, known) else tree.orelse, known)
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    values = [evaluate(a, known) for a in tree.args]
    if not _may_be_none(tree) and any(v is None for v in values):
        raise Unbound(ast.unparse(tree))
    return FUNCTIONS[tree.func.id](*values)


def _number(value: Any) -> Any:
    if value is None:
        raise Unbound("None in arithmetic")
    return value


def _logic(tree: ast.BoolOp, known: Mapping[str, Any]) -> bool:
    wanted = isinstance(tree.op, ast.Or)
    for part in tree.values:
        if bool(evaluate(part, known)) is wanted:
            return wanted
    return not wanted


def _compare(tree: ast.Compare, known: Mapping[str, Any]) -> bool:
    left = evaluate(tree.left, known)
    for op, right_tree in zip(tree.ops, tree.comparators, strict=True):
        right = evaluate(right_tree, known)
        ordered = isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
        if ordered and (left is None or right is None):
            raise Unbound(ast.unparse(tree))
        if not _COMPARISONS[type(op)](_plain(left), _plain(right)):
            return False
        left = right
    return True


def _plain(value: Any) -> Any:
    """Sequences as tuples, so that a list that the call passes equals one that the file writes; dtypes by name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, (list, torch.Size)) else value
