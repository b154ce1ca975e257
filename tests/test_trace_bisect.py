"""`v4 trace bisect`: planted faults named by op, layer and step, and faults that no call shows by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from ops.mutants import Plant
from tools import generate
from tools.cli import main, parser
from tools.trace import faults, swap


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.checkpoint(tmp_path_factory.mktemp("twelve"))


def bisect(model: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main([*faults.command(model, *options), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_there_are_twenty_faults_in_many_places() -> None:
    plants = [Plant.parse(fault) for fault in faults.FAULTS]
    assert len(plants) == len(set(faults.FAULTS)) >= 20
    assert len({p.variant.op for p in plants}) >= 12 and len({p.place for p in plants}) >= 12
    assert all(p.place and p.step is not None for p in plants)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_planted_fault_is_named(fault: str, twelve: Path) -> None:
    first = faults.named(twelve, fault)
    assert faults.exactly(fault, first), first


def test_a_right_run_has_nothing_wrong(twelve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bisect(twelve, capsys=capsys)
    assert code == 0 and found["ok"] and not found["findings"]
    assert found["judged"] == found["calls"] > 1500
    assert found["swap"]["found"] == [] and found["swap"]["distance"] == 0.0 < found["swap"]["noise"]


def test_every_wrong_call_is_listed_on_demand(twelve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--plant", "rms_norm:weight_lost@layers.11", "--all", "--only", "rms_norm", "--places", "11")
    code, found = bisect(twelve, *options, capsys=capsys)
    assert code == 1
    assert [f["count"] for f in found["findings"]] == list(range(3 * faults.NEW))
    assert found["first"] == found["findings"][0] and found["first"]["step"] == 0


def test_the_report_says_how_to_keep_the_call(twelve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(faults.command(twelve, "--plant", "hc_head:mean@head#0")) == 1
    out = capsys.readouterr().out
    assert "FIRST WRONG CALL: hc_head@head#0 (step 0, backend cpu)" in out
    assert "v4 trace record --out DIR --places head --only hc_head --steps 0" in out


# ---- faults that need more than one call ------------------------------------------------------------------------------


Fault = Callable[[str, SimpleNamespace], SimpleNamespace]


def request(model: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> generate.Request:
    """A run in fp32 whose ops `fault` changes part by part."""
    monkeypatch.setattr(generate.Request, "scope", lambda self, place, ops: fault(place, ops))
    made = generate.prepare(parser().parse_args([*faults.command(model), "--dtype", "float32"]))
    return replace(made, plants=(Plant.parse("rms_norm:nan"),))  # some plant, so that the changed scope is asked


class SharedMemory:
    """q_norm_rope of one layer returns memory that the next rope of that layer writes to: right when returned, wrong when read."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.kept: Tensor | None = None

    def __call__(self, place: str, ops: SimpleNamespace) -> SimpleNamespace:
        if place != self.place:
            return ops

        def q_norm_rope(*args: Any, **kwargs: Any) -> Tensor:
            self.kept = ops.q_norm_rope(*args, **kwargs)
            return self.kept

        def rope(*args: Any, **kwargs: Any) -> Tensor:
            found = ops.rope(*args, **kwargs)
            if self.kept is not None:
                self.kept.view(-1)[: found.numel()] = found.view(-1)[: self.kept.numel()]
                self.kept = None
            return found

        return SimpleNamespace(**{**vars(ops), "q_norm_rope": q_norm_rope, "rope": rope})


class WrongCache:
    """cache_insert of one layer spoils the rows that another layer stored in the step before."""

    def __init__(self, place: str, victim: str) -> None:
        self.place, self.victim = place, victim
        self.cache: Tensor | None = None

    def __call__(self, place: str, ops: SimpleNamespace) -> SimpleNamespace:
        def insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
            ops.cache_insert(cache, rows_RW, slots)
            if place == self.victim:
                self.cache = cache
            elif self.cache is not None and rows_RW.shape[0]:
                self.cache *= 1.5

        return SimpleNamespace(**{**vars(ops), "cache_insert": insert}) if place in (self.place, self.victim) else ops


def test_a_result_that_changes_before_it_is_read_is_found(
    twelve: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = request(twelve, SharedMemory("layers.4"), monkeypatch)
    monkeypatch.setattr(generate, "prepare", lambda args: made)
    code, found = bisect(twelve, capsys=capsys)
    assert code == 1
    assert (found["first"]["kind"], found["first"]["op"], found["first"]["place"]) == ("changed", "sparse_attention", "layers.4")
    assert "argument q_THC is not what q_norm_rope@layers.4#0 (step 0) returned" in found["first"]["problems"][0]


def test_a_fault_outside_its_own_arguments_is_found_by_swapping(twelve: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = request(twelve, WrongCache("layers.3", "layers.5"), monkeypatch)
    tokens = [5, 6, 7, 8, 9]
    found = swap.search(made, tokens, "cpu")
    (fault,) = found["found"]
    assert (fault["op"], fault["place"], fault["count"]) == ("cache_insert", "layers.3", 2)  # the window's row of the second step
    assert found["distance"] > 10 * found["noise"] and fault["distance"] < found["distance"] / 4


@pytest.mark.parametrize("plant", ["rms_norm:nan@layers.0#999", "grouped_experts:nan@layers.0"])
def test_a_fault_that_is_never_reached_is_said(plant: str, twelve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = faults.command(twelve)[2:]
    assert main(["generate", *run, "--plant", plant]) == 2
    assert f"planted fault {plant} was never reached" in capsys.readouterr().err
    assert main(["generate", *run, "--plant", "rms_norm:nan@layers.0#0"]) == 0
