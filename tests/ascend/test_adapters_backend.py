"""The backend around its adapters: limits and their grammar, what is kept between calls, weights after loading, probe, coverage table."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import backends.ascend
from backends.ascend import expressions
from backends.ascend.chips import family
from backends.ascend.hoist import ByIdentity, ByValue
from backends.ascend.lengths import Lengths
from backends.ascend.limits import FILE, LimitError, check, enforced, limits
from backends.ascend.plain import REASONS
from backends.ascend.prepare import prepare
from backends.ascend.probe import _hint, _soc, device_type, probe, registered
from backends.ascend.recipes import TARGETS
from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind, load_backend
from tools.ascend_coverage import PAGE, rows, with_table
from tools.npu_standin import schemas
from v4.convert import KINDS

FOLDER = Path(backends.ascend.__file__).parent


# ---- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known", "value"),
    [
        ("a + 2 * b // 3 - 1", {"a": 4, "b": 3}, 5),
        ("a % 2 == 0 and 1 <= a < 9", {"a": 4}, True),
        ("not (a in (1, 2)) or b is None", {"a": 1, "b": None}, True),
        ("xs[1] - xs[0] == 2", {"xs": [3, 5]}, True),
        ("power_of_two(a) and ceil_div(a, 3) == 3", {"a": 8}, True),
        ("given(t) and size(t, 0) == 2 and type(t) == 'bfloat16'", {"t": torch.zeros(2, 3, dtype=torch.bfloat16)}, True),
        ("mode == 'x' or layout in ['TND', 'BSND']", {"mode": "y", "layout": "TND"}, True),
        ("-a", {"a": 3}, -3),
    ],
)
def test_expressions(text: str, known: dict[str, Any], value: Any) -> None:
    assert expressions.evaluate(expressions.parse(text), known) == value


@pytest.mark.parametrize("text", ["__import__('os')", "a.b", "[x for x in a]", "f'{a}'", "lambda: 1", "open('x')", "size(t=1)"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(SyntaxError):
        expressions.parse(text)


def test_a_name_without_a_value_says_nothing() -> None:
    with pytest.raises(expressions.Unbound):
        expressions.evaluate(expressions.parse("a > 1"), {})
    with pytest.raises(expressions.Unbound):
        expressions.evaluate(expressions.parse("size(t, 0) > 1"), {"t": None})


def test_every_entry_is_readable_and_every_op_that_is_called_has_one() -> None:
    known = limits()
    called = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := _vendor(ast.unparse(node.func))):
                called.add(name)
    assert len(called) >= 15
    assert not called - set(known), "these ops are called without limits"


def _vendor(text: str) -> str | None:
    parts = text.split(".")
    return f"{parts[2]}::{parts[3]}" if parts[:2] == ["torch", "ops"] and len(parts) == 4 else None


def test_vendor_ops_are_called_by_keyword() -> None:
    """Positions differ between namespaces and versions."""
    positional = []
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and "torch.ops" in ast.unparse(node.func) and node.args and "getattr(" not in ast.unparse(node.func):
                positional.append(f"{path.name}:{node.lineno}")
    assert not positional


def test_needs_of_every_implementation_are_schemas_that_exist() -> None:
    load_backend("ascend")
    names = {n.partition("(")[0] for c in CONTRACTS.values() for i in c.candidates("ascend") for n in i.needs if "::" in n}
    assert len(names) > 15
    for name in names:
        assert str(schemas.schema(name)).startswith(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": torch.ones(4)}, r"gamma has shape \[4\], documented: \[D\] with D = 8"),
        ({"input": torch.ones(2, 8, dtype=torch.int32)}, "input is int32, documented: bfloat16 or float16 or float32"),
        ({"epsilon": None}, "epsilon left to the vendor's default"),
    ],
)
def test_a_call_outside_its_limits_says_what_is_documented(change: dict[str, Any], match: str) -> None:
    passed = {"input": torch.ones(2, 8), "gamma": torch.ones(8), "epsilon": 1e-6}
    check("npu::npu_rms_norm", passed, {}, "910_93")
    changed = {k: v for k, v in {**passed, **change}.items() if v is not None}
    with pytest.raises(LimitError, match=match):
        check("npu::npu_rms_norm", changed, {"epsilon": 1e-6}, "910_93")


def test_chips_and_unknown_ops() -> None:
    with pytest.raises(LimitError, match="called on 950, documented for 910_93, 910b"):
        check("custom::scatter_nd_update_asc", {}, {}, "950")
    with pytest.raises(LimitError, match=f"not in {FILE.name}"):
        check("npu::npu_gelu", {}, {}, "950")


def test_limits_are_enforced_inside_the_block_only(soc: str, device: torch.device) -> None:
    x, short = torch.ones(2, 8, device=device), torch.ones(4, device=device)
    with enforced(soc), pytest.raises(LimitError):
        torch.ops.npu.npu_rms_norm(input=x, gamma=short, epsilon=1e-6)
    torch.ops.npu.npu_rms_norm(input=x, gamma=torch.ones(8, device=device))


def test_checked_binding_keeps_the_limits(soc: str, device: torch.device) -> None:
    found = Probe(device=device.type, soc=soc, ask=registered)
    for checked in (False, True):
        ops = bind(("ascend",), dtype=torch.bfloat16, probes={"ascend": found}, checked=checked, only=["rms_norm"]).ops
        x = torch.ones(2, 8, dtype=torch.bfloat16, device=device)
        assert ops.rms_norm(x, x[0], eps=1e-6).shape == (2, 8)


# ---- what is kept between calls -------------------------------------------------------------------------------------------


def test_host_tensors_are_found_by_content() -> None:
    made: list[int] = []
    kept = ByValue(kept=2)

    def make() -> int:
        made.append(1)
        return len(made)

    lengths = torch.tensor([0, 3], dtype=torch.int32)
    assert kept(("a",), (lengths,), make) == 1
    assert kept(("a",), (lengths.clone(),), make) == 1
    lengths.numpy()[1] = 4  # as block tables are written, behind torch's back
    assert kept(("a",), (lengths,), make) == 2
    assert kept(("b",), (lengths,), make) == 3
    assert kept(("a",), (lengths.long(),), make) == 4
    assert len(kept._found) == 2


def test_device_tensors_are_found_by_identity_until_they_are_written() -> None:
    made: list[int] = []
    kept = ByIdentity()

    def make() -> int:
        made.append(1)
        return len(made)

    table = torch.zeros(3)
    assert kept(table, (), make) == kept(table, (), make) == 1
    assert kept(table, ("other",), make) == 2
    table.add_(1)
    assert kept(table, (), make) == 3
    assert kept(table.clone(), (), make) == 4
    del table
    assert not kept._found


def test_lengths() -> None:
    cu, start = torch.tensor([0, 3, 3, 4], dtype=torch.int32), torch.tensor([2, 9, 127], dtype=torch.int32)
    found = Lengths(cu, start, torch.device("cpu"))
    assert (found.batch, found.tokens, found.longest, found.ends_host) == (3, 4, 3, [5, 9, 128])
    assert found.completed(4) == 1 + 0 + 1 and found.completed(128) == 1
    assert found.counts.tolist() == [3, 0, 1] and found.ends.tolist() == [5, 9, 128]
    assert found.compressed(4).tolist() == [1, 2, 32] and found.residual(4).tolist() == [1, 1, 0]
    assert {t.dtype for t in (found.cu_seqlens, found.start, found.counts, found.ends, found.compressed(4), found.residual(4))} == {torch.int32}


# ---- weights, probe, tables -----------------------------------------------------------------------------------------------


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.gate = nn.Module(), nn.Module()
        self.attn.wo_a = nn.Parameter(torch.arange(24.0).view(2, 3, 4).bfloat16(), requires_grad=False)
        self.gate.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16), requires_grad=False)
        self.gate.tid2eid = nn.Parameter(torch.arange(6).view(3, 2), requires_grad=False)


def test_weights_keep_their_values() -> None:
    model = nn.ModuleDict({"layer": _Small()})
    before = {n: p.clone() for n, p in model.named_parameters()}
    prepare(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n].double(), before[n].double()) for n in before)
    assert after["layer.attn.wo_a"].transpose(1, 2).is_contiguous() and not after["layer.attn.wo_a"].is_contiguous()
    assert after["layer.gate.weight"].dtype == torch.float32 and after["layer.gate.tid2eid"].dtype == torch.int32


def test_chip_names() -> None:
    assert [family(n) for n in ("Ascend910B2", "Ascend910_9391", "Ascend950PR_9599")] == ["910b", "910_93", "950"]
    with pytest.raises(ValueError, match=r"'Ascend310P3'; this backend knows Ascend910B\*"):
        family("Ascend310P3")


def test_settings_by_name(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4_ASCEND_SOC", "a3")
    assert probe().soc == "910_93"
    monkeypatch.setenv("V4_ASCEND_SOC", "a7")
    with pytest.raises(ValueError, match="V4_ASCEND_SOC: found 'a7', expected one of 910b"):
        _soc()
    monkeypatch.setenv("V4_ASCEND_DEVICE", "gpu")
    with pytest.raises(ValueError, match="V4_ASCEND_DEVICE: found 'gpu', expected npu or cpu"):
        device_type()


def test_a_missing_package_is_named_with_what_to_install() -> None:
    load_backend("ascend")
    bare = Probe(soc="910_93", ask=lambda name: name.startswith("npu::"), hint=_hint)
    choice = bind(("ascend",), dtype=torch.bfloat16, probes={"ascend": bare}, only=["compress"]).choices[0]
    note = dict(choice.notes)["ascend"]
    assert "missing custom::compressor" in note and "install the custom_ops package of cann-recipes-infer" in note and "found torch_npu" in note


def test_ops_that_only_plain_torch_serves_say_why() -> None:
    load_backend("ascend")
    alone = {c.name for c in CONTRACTS.values() if c.impls.get("ascend") and not any(i.name for i in c.candidates("ascend"))}
    assert alone == set(REASONS)


def test_the_page_shows_the_current_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tools.ascend_coverage --write"


def test_every_cell_of_the_coverage_is_served_or_has_a_reason() -> None:
    cells = {(op, chip, kind) for op, chips, types, _ in rows() for chip in chips.split() for kind in types.split()}
    assert {op for op, _, _ in cells} == set(CONTRACTS)
    for op, _, _, answer in rows():
        assert not answer.startswith("plain torch") or ": " in answer, f"{op}: {answer} has no reason"


def test_targets_name_storage_that_exists() -> None:
    assert {mode.kind for mode in TARGETS.values()} == set(KINDS)
    assert {chip for mode in TARGETS.values() for chip in mode.chips} == {"910b", "910_93", "950"}
