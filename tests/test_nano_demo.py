"""The demo's exit code says whether the answer was the planted one; tests/test_nano_trained.py runs it on the trained model."""

from pathlib import Path

import pytest

from tests.test_nano_training import shaken, small
from tools.nano.__main__ import main
from tools.nano.export import export
from tools.nano.tokenizer import train, write


def test_untrained_model_is_said_to_be_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(train(1024), tmp_path / "made.json")
    export(shaken(small(index_topk=8)), tmp_path / "model", tokenizer=tmp_path / "made.json")
    assert main(["demo", "--model", str(tmp_path / "model"), "--context", "200", "--story-tokens", "8"]) == 1
    out = capsys.readouterr().out
    assert "[wrong, expected: The " in out
    assert "index_topk" in out


def test_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(shaken(small()), tmp_path / "model")
    assert main(["demo", "--model", str(tmp_path / "model")]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
