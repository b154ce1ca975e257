"""Traces between the stand-in's devices and the CPU: what is recorded on one side is judged and repeated on the other, op call by op call."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ops.trace import Trace
from tests.ascend.conftest import HARDWARE, LEVEL
from tools.cli import main
from tools.npu_standin.calls import recording
from tools.runconfig import named_config
from v4.make import make

IDS = ",".join(map(str, [0, *range(5, 45)]))
KEPT = ("--places", "2,3,head")
"""One layer with the indexer, one with long compressed entries, and the head."""
GATE, NORM = "gate_topk:bias_in_weights@layers.3#1", "rms_norm:weight_plus_one@layers.2#5"
"""Faults to plant: the bias of the first decoding step's choice, and a norm inside a layer."""
VENDOR = {"rms_norm", "gate_topk", "moe_mlp", "cache_insert"}
"""Ops of these places that vendor ops must have served, so that a trace of plain torch alone is not taken for one of the chip."""


@functools.cache
def nano() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="v4-nano-"))
    make(named_config("nano"), folder, 0)
    return folder


@pytest.fixture(autouse=True)
def chip(soc: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if LEVEL == "l2" and not HARDWARE and soc != "910_93":
        pytest.skip("takes seconds: one chip here, every chip at l3")
    monkeypatch.setenv("V4_ASCEND_SOC", soc)
    monkeypatch.setenv("V4_ASCEND_DEVICE", device.type)


def record(out: Path, backend: str, *options: str) -> Path:
    command = ("--model", str(nano()), "--backend", backend, "--ids", IDS, "--max-new-tokens", "2", *KEPT, *options)
    with recording() as seen:
        assert main(["trace", "record", "--out", str(out), *command]) == 0
    assert HARDWARE or bool(seen.launches("vendor")) == (backend == "ascend")
    return out


def replay(folder: Path, backend: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    with recording() as seen:
        code = main(["trace", "replay", str(folder), "--backend", backend, "--json", *options])
    assert HARDWARE or bool(seen.launches("vendor")) == (backend == "ascend")
    return code, json.loads(capsys.readouterr().out)


@functools.cache
def right_on_cpu() -> Path:
    return record(Path(tempfile.mkdtemp(prefix="v4-trace-")) / "t", "cpu")


def green(folder: Path, there: str, here: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(folder, here, capsys)
    assert code == 0 and found["ok"] and not found["wrong"], found["wrong"][:3]
    assert found["recorded_on"]["backend"] == there and found["backend"] == here
    assert found["calls"] == len(Trace(folder).kept) > 50
    assert set(found["by_op"]) >= VENDOR


def test_recorded_on_the_chip_replays_green_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    green(record(tmp_path / "t", "ascend"), "ascend", "cpu", capsys)


def test_recorded_on_the_cpu_replays_green_on_the_chip(capsys: pytest.CaptureFixture[str]) -> None:
    green(right_on_cpu(), "cpu", "ascend", capsys)


def test_a_fault_on_the_chip_is_located_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What went wrong is only in the recording: repeated on the CPU, every call is right."""
    code, found = replay(record(tmp_path / "t", "ascend", "--plant", GATE), "cpu", capsys)
    assert code == 1 and not found["ok"]
    assert found["first_recorded"]["where"] == "gate_topk@layers.3#1" and found["first_replayed"] is None
    assert [w["where"] for w in found["wrong"]] == ["gate_topk@layers.3#1"]


def test_a_fault_of_the_replaying_chip_is_located(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(right_on_cpu(), "ascend", capsys, "--plant", NORM)
    assert code == 1 and not found["ok"]
    assert found["first_replayed"]["where"] == "rms_norm@layers.2#5" and found["first_recorded"] is None
    assert [w["where"] for w in found["wrong"]] == ["rms_norm@layers.2#5"]
