"""Departures of one backend from another are found, measured, and called near ties only where they are."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests import untrained_nano
from tools.cli import main as v4_main
from tools.eval import backends
from tools.eval.__main__ import main, ok
from tools.eval.apart import choice_differences, token_difference


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return untrained_nano.checkpoint()


def test_tokens() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.95], [0.0, 0.0, 1.0]])
    assert token_difference([0, 1, 2], [0, 1, 2], a, a) is None
    noisy = a + torch.tensor([[0.06, 0.0, 0.0]])
    found = token_difference([0, 1, 2], [0, 2, 2], a, noisy)
    assert found is not None and found["token"] == 1 and found["near"]
    assert abs(found["margin"] - 0.05) < 1e-6
    # the margin is the same, the noise is not: no near tie
    quiet = token_difference([0, 1, 2], [0, 2, 2], a, a + torch.tensor([[0.006, 0.0, 0.0]]))
    assert quiet is not None and not quiet["near"]
    with pytest.raises(ValueError, match="the same number"):
        token_difference([0, 1], [0], a, a)


def choice(chosen: list[int], score: list[float], step: int = 0) -> dict[str, object]:
    shaped = torch.tensor([score], dtype=torch.float64)
    return {"op": "index_topk", "place": "layers.1", "step": step, "chosen_TK": torch.tensor([chosen]), "score_TN": shaped}


def test_choices() -> None:
    base = choice([0, 1], [3.0, 2.0, 1.99])
    near = choice_differences("index_topk", [base], [choice([0, 2], [3.0, 2.0, 2.01])])
    assert (near["rows"], near["unlike"], near["near"], near["tied"]) == (1, 1, 1, 0)
    assert abs(near["first"]["margin"] - 0.01) < 1e-9
    far = choice_differences("index_topk", [base], [choice([1, 2], [3.0, 2.0, 1.99])])
    assert (far["unlike"], far["near"]) == (1, 0)
    tied = choice_differences("index_topk", [choice([0, 1], [0.0, 0.0, 0.0])], [choice([1, 0], [0.0, 0.0, 0.0])])
    assert (tied["unlike"], tied["tied"]) == (0, 1)
    unseen = choice_differences("index_topk", [choice([0, -1], [1.0, -torch.inf])], [choice([0, -1], [1.0, -torch.inf])])
    assert unseen["rows"] == 0
    with pytest.raises(ValueError, match="did not follow the same text"):
        choice_differences("index_topk", [base], [choice([0, 1], [3.0, 2.0, 1.0], step=1)])


@pytest.mark.slow
def test_whole_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["backends", "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--lengths", "160", "--trials", "1"]
    options += ["--texts", "1", "--text-length", "80", "--new-tokens", "6", "--modes", "cpu-bf16", "--json", str(tmp_path / "found.json")]
    code = main(options)
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == (0 if ok(found) else 1)
    base, bf16 = found["modes"]
    assert base["texts"][0]["token"] is None
    assert base["texts"][0]["index_topk"]["rows"] > 0
    assert bf16["judged"] > 0 and bf16["wrong"] == []
    assert "| CPU, bf16 |" in capsys.readouterr().out
    found["modes"][1]["texts"][0]["token"] = {"near": False}
    assert not ok(found)
    assert main(options) == code
    assert "is there, not run again" in capsys.readouterr().err
    assert main([*options, "--trials", "2"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_wrong_choice_is_found(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "found.json"
    common = ["eval", "greedy", "--model", str(checkpoint), "--dtype", "float32", "--trials", "1", "--length", "80", "--new-tokens", "3"]
    assert v4_main([*common, "--save", str(saved)]) == 0
    assert v4_main([*common, "--plant", "index_topk:random@layers.1", "--save", str(saved)]) == 1
    wrong = json.loads(saved.read_text())["wrong"]
    assert wrong and all("index_topk@layers.1" in w for w in wrong)
    assert v4_main([*common, "--follow", str(saved), "--seed", "1"]) == 2
    assert "continues other prompts" in capsys.readouterr().err


def test_wrong_options(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["backends", "--model", str(checkpoint), "--out", str(tmp_path)]
    assert main([*common, "--modes", "a3-bf16"]) == 2
    assert "needs --ascend-python" in capsys.readouterr().err
    assert main([*common, "--modes", "a4"]) == 2
    assert "unknown modes a4" in capsys.readouterr().err
    plan = backends.Plan(tmp_path / "none", tmp_path, {"cpu": sys.executable})
    with pytest.raises(ValueError, match="run it alone: v4 eval greedy"):
        backends.run_mode(plan, backends.BASE, print)
