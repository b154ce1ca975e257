"""The precision classes of the ascend backend: every contract has one, and a cell that is worse than its class is complained of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ops.contract import CONTRACTS
from ops.registry import load_backend
from tools.ascend_parity import CHIPS, command, complaints, declared, main


def report(op: str = "rope", *, worst: float = 0.5, failures: int = 0, holes: tuple[dict[str, str], ...] = ()) -> dict[str, Any]:
    row = {"cases": 20, "failures": failures, "worst": worst}
    return {"cases": 20, "failures": [{}] * failures, "by_op": {op: row}, "holes": list(holes)}


def test_every_contract_has_a_class_and_every_named_adapter_exists() -> None:
    load_backend("ascend")
    precision = declared()
    assert set(precision.contracts) == set(CONTRACTS)
    assert set(precision.contracts.values()) == set(precision.classes)
    labels = {i.name for c in CONTRACTS.values() for i in c.candidates("ascend")}
    assert set(precision.rounds_between) <= labels
    choices = {name for name, c in CONTRACTS.items() if c.choices}
    assert {op for op, name in precision.contracts.items() if name == "choice"} <= choices


def test_complaints() -> None:
    precision = declared()
    assert complaints({("950", "bf16"): report()}, precision) == []
    assert complaints({("950", "bf16"): report("cache_insert", worst=0.1)}, precision) == [
        "cache_insert on 950, bf16: error/bound 0.1, class bits allows 0"
    ]
    assert complaints({("910b", "fp16"): report(failures=2)}, precision) == ["rope on a2, fp16: 2 of 20 cases are wrong"]
    hole = {"op": "linear", "reason": "not written"}
    assert complaints({("910_93", "fp32"): report(holes=(hole,))}, precision) == ["linear on a3, fp32: not judged: not written"]


def test_table_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path)]) == 2
    assert "no reports" in capsys.readouterr().err
    (tmp_path / "910b_bf16.json").write_text(json.dumps(report()), encoding="utf-8")
    assert main(["table", str(tmp_path)]) == 0
    assert "| rope | fp32 | 0.50 (20) | not run |" in capsys.readouterr().out
    (tmp_path / "910b_bf16.json").write_text(json.dumps(report(failures=1)), encoding="utf-8")
    assert main(["table", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "1 of 20 wrong" in out and "rope on a2, bf16: 1 of 20 cases are wrong" in err


def test_one_chip_at_a_time_on_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--out", str(tmp_path), "--here"]) == 2
    assert "give the chip of this machine" in capsys.readouterr().err
    on_node, pretended = (command("910_93", "bf16", 5, tmp_path / "x.json", here=here) for here in (True, False))
    assert "tools.cli" in on_node and "tools.npu_standin" not in on_node
    assert pretended[2:6] == ["tools.npu_standin", "--soc", "a3", "--"]


def test_the_page_holds_every_cell() -> None:
    """The committed matrix has a row for every contract, no cell that was not run, and none that is wrong."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "ascend.md").read_text(encoding="utf-8")
    part = page.split("<!-- measured parity: begin -->")[1].split("<!-- measured parity: end -->")[0]
    rows = {line.split("|")[1].strip(): line for line in part.splitlines() if line.startswith("|")}
    assert set(CONTRACTS) <= set(rows)
    for op in CONTRACTS:
        cells = rows[op].split("|")[3:-1]
        assert len(cells) == 3 * len(CHIPS)
        assert all("(" in c and "wrong" not in c and "hole" not in c and "not run" not in c for c in cells), rows[op]
