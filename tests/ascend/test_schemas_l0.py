"""Level 0, without torch_npu: every vendor call in the backend's source names an op of the vendored schemas and arguments that it has.

The source is read, not run, so lines that no test reaches are checked too. Arguments must be given by keyword; those that contracts.yaml lists
as `explicit` must be there. Keywords that come from `**name` are looked up where the name is assigned in the same function, as far as the text
shows them; if it does not show them the call is only checked for what it names itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.ascend.limits import NAMESPACES, limits
from tools.npu_standin import schemas

ROOT = Path(__file__).parents[2] / "backends" / "ascend"
Call = tuple[str, ast.Call, ast.FunctionDef | None]


def _ops_of(node: ast.expr) -> list[str]:
    """["npu::x"] of the expression torch.ops.npu.x, with or without an overload behind it; every "?::x" of getattr(torch.ops, name).x."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "torch" and parts[:1] == ["ops"] and len(parts) >= 3 and parts[1] in NAMESPACES:
        return [f"{parts[1]}::{'.'.join(parts[2:])}".removesuffix(".default")]
    if isinstance(node, ast.Call) and len(parts) == 1 and ast.unparse(node).startswith("getattr(torch.ops, "):
        return [f"{space}::{parts[0]}" for space in sorted(NAMESPACES) if f"{space}::{parts[0]}" in limits()] or [
            f"?::{parts[0]}"
        ]
    return []


def vendor_calls(tree: ast.AST, inside: ast.FunctionDef | None = None) -> Iterator[Call]:
    """(op, call, function around it) of every call of torch.ops.<vendor namespace>.<op>; one for each namespace that a computed one can be."""
    for node in ast.iter_child_nodes(tree):
        around = node if isinstance(node, ast.FunctionDef) else inside
        if isinstance(node, ast.Call):
            yield from ((op, node, around) for op in _ops_of(node.func))
        yield from vendor_calls(node, around)


def _keys_of(name: str, function: ast.FunctionDef | None) -> set[str] | None:
    """Keywords that `**name` brings, None when the text does not show them all."""
    keys: set[str] = set()
    known = False
    for node in ast.walk(function) if function else ():
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, (ast.AnnAssign, ast.AugAssign))
            else None
        )
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id == name:
            if isinstance(target.slice, ast.Constant):
                keys.add(str(target.slice.value))
        elif isinstance(target, ast.Name) and target.id == name and not isinstance(node, ast.FunctionDef):
            value = getattr(node, "value", None)
            if not isinstance(value, ast.Dict):
                return None
            for key, item in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    keys.add(str(key.value))
                elif key is None and isinstance(item, ast.Name) and (more := _keys_of(item.id, function)) is not None:
                    keys |= more
                else:
                    return None
            known = True
    return keys if known else None


def problems(op: str, call: ast.Call, function: ast.FunctionDef | None) -> list[str]:
    """What is wrong with one call; empty when nothing is."""
    try:
        schema = schemas.schema(op)
    except ValueError:
        return [f"{op} is in no vendored schema"]
    found: list[str] = []
    if call.args:
        found.append(f"{op}: {len(call.args)} arguments are not named")
    named = {k.arg for k in call.keywords if k.arg}
    complete = True
    for keyword in call.keywords:
        if keyword.arg is None:
            keys = _keys_of(keyword.value.id, function) if isinstance(keyword.value, ast.Name) else None
            complete = complete and keys is not None
            named |= keys or set()
    known = {a.name for a in schema.arguments}
    found += [f"{op} has no argument {name}" for name in sorted(named - known)]
    if complete:
        missing = {a.name for a in schema.arguments if not a.has_default_value()} - named
        found += [f"{op} needs {name}" for name in sorted(missing)]
        if op in limits():
            found += [f"{op}: {name} left to the vendor's default" for name in limits()[op].explicit if name not in named]
    if op not in limits():
        found.append(f"{op} has no entry in contracts.yaml")
    return found


CALLS = [
    (path, *found) for path in sorted(ROOT.rglob("*.py")) for found in vendor_calls(ast.parse(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(
    "path,op,call,function", CALLS, ids=[f"{path.stem}-{op.partition('::')[2]}-{call.lineno}" for path, op, call, _ in CALLS]
)
def test_a_call_fits_its_schema(path, op, call, function):
    assert not problems(op, call, function), f"{path.name}, line {call.lineno}"


def test_calls_were_found():
    assert len(CALLS) > 10


@pytest.mark.parametrize(
    "source,message",
    [
        ("torch.ops.npu.npu_rms_nrom(input=x, gamma=w, epsilon=e)", "npu_rms_nrom is in no vendored schema"),
        ("torch.ops.npu.npu_rms_norm(input=x, gamma=w, eps=e)", "has no argument eps"),
        ("torch.ops.npu.npu_rms_norm(input=x, epsilon=e)", "needs gamma"),
        ("torch.ops.npu.npu_rms_norm(x, gamma=w, epsilon=e)", "1 arguments are not named"),
        ("torch.ops.npu.npu_rms_norm(input=x, gamma=w)", "epsilon left to the vendor's default"),
        ("torch.ops.npu.npu_rms_norm.default(input=x, gamma=w)", "epsilon left to the vendor's default"),
        ("torch.ops._C_ascend.npu_hc_pre_v2(x)", "has no entry in contracts.yaml"),
        ("getattr(torch.ops, w).npu_absent(x=x)", "npu_absent is in no vendored schema"),
        (
            "getattr(torch.ops, w).inplace_partial_rotary_mul(x=x, r1=w, r2=e, rotary_mode='interleave', slice=[0, 2])",
            "has no argument slice",
        ),
        ("about = {'input': x, 'gama': w, 'epsilon': e}\n    torch.ops.npu.npu_rms_norm(**about)", "has no argument gama"),
    ],
)
def test_a_wrong_call_is_found(source, message):
    tree = ast.parse(f"def f(x, w, e):\n    {source}\n")
    calls = list(vendor_calls(tree))
    assert calls
    assert all(any(message in found for found in problems(*call)) for call in calls)


def test_a_right_call_passes():
    tree = ast.parse(
        "def f(x, w, e):\n    about = {'gamma': w}\n    about['epsilon'] = e\n    torch.ops.npu.npu_rms_norm(input=x, **about)\n"
    )
    ((op, call, function),) = vendor_calls(tree)
    assert problems(op, call, function) == []
