"""`v4 parity`: what it counts, what makes it fail, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import load_backend
from tools.cli import main
from tools.parity import gaps
from tools.parity.cases import Combination, Outcome, judge_combination, socs_of
from tools.parity.gaps import Gap
from tools.parity.rules import NAMES, compare

NATIVE = Combination("rms_norm", "cpu_native", "bf16", None)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["parity", "--quiet", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_counts_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, "--op", "rms_norm,index_topk", "--backend", "cpu,cpu_native")
    assert code == 0 and found["ok"]
    assert {"cases", "failures", "holes", "mutants_total", "mutants_killed", "false_alarms", "by_op"} <= set(found)
    assert found["cases"] == sum(row["cases"] for row in found["by_op"].values()) > 90
    assert found["mutants_killed"] == found["mutants_total"] > 70 and found["mutation"]["legal_cases"] > 100
    assert [h["known"] for h in found["holes"]] == [True, True]
    assert all(sum(row["classes"]) == row["cases"] for row in found["by_op"].values())


def test_a_planted_fault_is_found_and_its_command_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--op",
        "rms_norm",
        "--backend",
        "cpu",
        "--dtype",
        "bf16",
        "--plant",
        "rms_norm:eps_times_10",
        "--mutant-seeds",
        "0",
    )
    code, found = run(capsys, *options)
    assert code == 1 and 0 < len(found["failures"]) < found["cases"]
    worst = found["failures"][0]
    assert worst["repeat"].startswith("v4 parity --op rms_norm --backend cpu --dtype bf16 --seed 0 --sample ")
    code, again = run(capsys, *worst["repeat"].split()[2:], "--plant", "rms_norm:eps_times_10", "--legal-seeds", "0")
    assert code == 1 and again["cases"] == 1
    assert again["failures"][0]["worst"] == worst["worst"]


def test_against_judges_both(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--op", "rope", "--backend", "cpu", "--against", "cpu_native", "--dtype", "fp32", "--mutant-seeds", "0")
    code, found = run(capsys, *options, "--legal-seeds", "0")
    assert code == 0
    single = run(capsys, "--op", "rope", "--backend", "cpu", "--dtype", "fp32", "--mutant-seeds", "0", "--legal-seeds", "0")[1]
    assert found["cases"] > single["cases"]


def test_samples_asks_for_more_seeds() -> None:
    few, many, where = Outcome(), Outcome(), Combination("rms_norm", "cpu", "fp32", None)
    judge_combination(where, few, seed=0, at_least=1)
    judge_combination(where, many, seed=0, at_least=3 * len(few.cases))
    assert len(many.cases) == 3 * len(few.cases)
    assert {c.seed for c in many.cases} == {0, 1, 2}


def test_an_op_that_raises_is_a_wrong_case_and_the_others_are_judged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backend("cpu")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("aclnnRope failed, error code is 561000")

    monkeypatch.setitem(CONTRACTS["rope"].impls, "cpu", replace(CONTRACTS["rope"].impls["cpu"], fn=broken))
    code, found = run(capsys, "--op", "rope,rms_norm", "--backend", "cpu", "--dtype", "fp32", "--mutant-seeds", "0", "--legal-seeds", "0")
    assert code == 1 and {f["op"] for f in found["failures"]} == {"rope"}
    assert found["failures"][0]["problems"] == ["raised RuntimeError: aclnnRope failed, error code is 561000"]
    assert found["failures"][0]["worst"] is None
    assert found["by_op"]["rms_norm"]["failures"] == 0 < found["by_op"]["rms_norm"]["cases"]


def test_chips_of_a_machine_that_has_one() -> None:
    node = SimpleNamespace(SOCS=("910b", "910_93", "950"), probe=lambda: Probe(soc="910_93"))
    assert socs_of(node, ()) == socs_of(node, ("910_93",)) == ("910_93",)
    with pytest.raises(ValueError, match="the chip of this machine is 910_93"):
        socs_of(node, ("950",))
    desk = SimpleNamespace(SOCS=("910b", "950"), probe=lambda: Probe(soc=None))
    assert socs_of(desk, ()) == ("910b", "950") and socs_of(desk, ("950",)) == ("950",)
    assert socs_of(SimpleNamespace(), ()) == (None,)


def test_holes_and_known_gaps() -> None:
    line = Gap("cpu_native", "*", "bf16", "*", "fp32 only")
    assert gaps.compare([NATIVE], [NATIVE], [line]) == ([], [])
    assert gaps.compare([NATIVE], [NATIVE], []) == ([NATIVE], [])
    assert gaps.compare([], [NATIVE], [line]) == ([], [line])
    # a line about something that was not looked at is neither used nor unused
    assert gaps.compare([], [replace(NATIVE, dtype="fp32")], [line]) == ([], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op: x", "expected a list of lines"),
        ("- {op: rms_norm}", "expected op and reason"),
        ("- {op: rms_norm, reason: r, dtyp: bf16}", "did you mean 'dtype'"),
    ],
)
def test_a_wrong_gap_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaps.parse("cpu", text)


def test_new_holes_and_no_cases_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "load", lambda backends: [])
    code, found = run(capsys, "--op", "rms_norm", "--backend", "cpu_native", "--dtype", "bf16", "--mutant-seeds", "0")
    assert code == 1 and not found["cases"]
    assert any("no case was judged" in p for p in found["problems"]) and any("new hole" in p for p in found["problems"])


def test_too_few_cases_fail(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, "--op", "argmax", "--backend", "cpu", "--min-cases", "1000", "--mutant-seeds", "0")
    assert code == 1 and "expected at least 1000" in found["problems"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "rms_nrom"], "did you mean 'rms_norm'"),
        (["--dtype", "bf61"], "did you mean 'bf16'"),
        (["--backend", "cpuu"], "did you mean 'cpu'"),
        (["--samples", "0"], "at least 1"),
        (["--plant", "rms_norm:nan@layers.1"], "model run only"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *options]) == 2
    assert message in capsys.readouterr().err


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "parity.html"
    options = ["parity", "--op", "rms_norm,rope", "--quiet", "--html", str(page), "--mutant-seeds", "0"]
    assert main([*options, "--plant", "rope:nan"]) == 1
    text = page.read_text(encoding="utf-8")
    for part in ("Coverage", "rms_norm", "no kernel for torch.bfloat16", "wrong", "v4 parity --op rope", "<svg"):
        assert part in text
    assert "http" not in text, "the page loads nothing"
    capsys.readouterr()
    assert main(options) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == text


def test_other_rules_on_one_op() -> None:
    table = compare(["unit_rms_norm"], seed=0)
    assert list(table) == list(NAMES)
    mine = table["this judge"]
    assert mine["caught"] == mine["mutants"] > 20 and mine["false_alarms"] == 0 < mine["legal_cases"]
    assert table["cosine > 0.99"]["caught"] < mine["caught"]


def test_processes_share_the_work_without_changing_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--op",
        "rms_norm,rope,gate_hash",
        "--backend",
        "cpu",
        "--samples",
        "12",
        "--mutant-seeds",
        "2",
        "--legal-seeds",
        "2",
    ]
    alone, shared = (run(capsys, *options, "--jobs", jobs) for jobs in ("1", "2"))
    assert alone[0] == shared[0] == 0 and alone[1]["cases"] > 72
    assert {k: v for k, v in shared[1].items() if k != "command"} == {k: v for k, v in alone[1].items() if k != "command"}


def test_a_fault_is_found_by_processes_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--op",
        "rms_norm,rope",
        "--backend",
        "cpu",
        "--plant",
        "rms_norm:eps_times_10",
        "--mutant-seeds",
        "0",
        "--legal-seeds",
        "0",
        "--jobs",
        "2",
    ]
    code, found = run(capsys, *options)
    assert code == 1 and found["failures"] and all(f["op"] == "rms_norm" for f in found["failures"])
