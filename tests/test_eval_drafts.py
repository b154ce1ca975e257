"""`v4 eval drafts` counts acceptance by place and sees a speculative text that is not the greedy one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import v4
from tests import untrained_nano
from tools.cli import main
from tools.eval import drafts
from v4.generate import GenerateResult


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return untrained_nano.checkpoint()


def test_shares_by_place() -> None:
    results = [GenerateResult([], "length", 1, 0.0, 1.0, 3, 6, 3, [2, 0, 1]), GenerateResult([], "length", 1, 0.0, 1.0, 1, 2, 2, [2])]
    first, second = drafts.by_place(results, 2)
    assert (first["accepted"], first["steps"], first["share"]) == (3, 4, 0.75)
    assert (second["accepted"], second["share"], second["share_of_reached"]) == (2, 0.5, 2 / 3)
    with pytest.raises(ValueError, match="nothing was drafted"):
        drafts.by_place([], 1)


def test_first_difference() -> None:
    assert drafts.first_difference([1, 2], [1, 2]) is None
    assert drafts.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert drafts.first_difference([1, 2], [1, 2, 3]) == 2


def test_whole_verb(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["eval", "drafts", "--model", str(checkpoint), "--dtype", "float32", "--trials", "2", "--length", "32", "--new-tokens", "12"]
    options += ["--drafts", "2", "--batch-invariant", "--json"]
    assert main([*options, "--least", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["identical"], found["differences"]) == (2, [])
    assert [p["place"] for p in found["by_place"]] == [1, 2]
    assert main([*options, "--least", "1"]) == 1
    assert "fewer than 100% of drafts accepted" in capsys.readouterr().err

    honest = v4.LoadedModel.generate

    def changed(self: v4.LoadedModel, ids: list[int], count: int, **options: int) -> GenerateResult:
        result = honest(self, ids, count, **options)  # type: ignore[arg-type]
        if options["speculative"] and count > 5:
            result.tokens[5] ^= 1
        return result

    monkeypatch.setattr(v4.LoadedModel, "generate", changed)
    assert main([*options, "--least", "0"]) == 1
    out = capsys.readouterr()
    assert [d["token"] for d in json.loads(out.out)["differences"]] == [5, 5]
    assert "not the greedy one" in out.err


def test_steps_are_counted(checkpoint: Path) -> None:
    model = v4.load(checkpoint, dtype=torch.float32)
    result = model.generate([0, 5, 9], 10, speculative=2, stop=())
    assert len(result.accepted_runs) == result.steps
    assert (sum(result.accepted_runs), 2 * result.steps) == (result.accepted, result.drafted)


def test_wrong_options(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--drafts", "0"], ["--new-tokens", "1"], ["--length", "8"]):
        assert main(["eval", "drafts", "--model", str(checkpoint), *option]) == 2
        assert "expected at least 1, 2 and 32" in capsys.readouterr().err


def test_text() -> None:
    place = {"place": 1, "steps": 4, "accepted": 2, "share": 0.5, "low": 0.2, "high": 0.8}
    speed = {"greedy": 10.0, "speculative": 15.0, "ratio": 1.5}
    difference = {"trial": 3, "token": 7}
    found = SimpleNamespace(by_place=[place], identical=1, trials=2, differences=[difference], tokens_per_second=speed)
    assert "story 3 departs at token 7" in drafts.text(vars(found))
