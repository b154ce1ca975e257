"""The model card says what its JSON and files say; the committed one is up to date."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.test_nano_training import shaken, small
from tools.nano import card
from tools.nano.__main__ import main
from tools.nano.export import export

COMMITTED = Path(__file__).parents[1] / "models" / "nano"
COMMON = {"model": "m", "backend": "cpu", "dtype": "float32", "numerics": "exact", "seed": 0, "trials": 200, "plants": []}
DEPTHS = [{"depth": 0.25, "trials": 100, "right": 97}, {"depth": 0.75, "trials": 100, "right": 100}]
NEEDLE = {
    **COMMON, "kind": "needle",
    "lengths": [{"length": 4096, "trials": 200, "accuracy": 0.985, "low": 0.957, "high": 0.995, "by_depth": DEPTHS}],
}  # fmt: skip
LOG = '{"step": 50, "loss": 0.5, "answers": 0.25, "draft": 0.75, "index": 0.125}\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    export(shaken(small()), tmp_path / "model")
    (tmp_path / "needle.json").write_text(json.dumps(NEEDLE))
    (tmp_path / "log.jsonl").write_text(LOG)
    return tmp_path / "model"


def made(model: Path) -> int:
    at = model.parent
    options = ["--evaluation", str(at / "needle.json"), "--log", str(at / "log.jsonl"), "--command", "train it"]
    return main(["card", "--model", str(model), *options])


def test_card_is_made_of_its_files(model: Path) -> None:
    assert made(model) == 0
    text = (model / card.CARD).read_text()
    assert text == card.of_directory(model)
    for part in ("98.5% of 200 (95.7% to 99.5%)", "`train it`, 50 steps", "loss 0.5000", "license: apache-2.0", "cpu, float32, exact, seed 0"):
        assert part in text
    assert f"({card.NEEDLES})" in text
    for picture in (card.PICTURE, card.NEEDLES):
        assert (model / picture).read_bytes()[:4] == b"\x89PNG"
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert text != card.of_directory(model)


def test_changed_evaluation_is_seen(model: Path) -> None:
    made(model)
    stored = json.loads((model / card.EVALUATION).read_text())
    stored["reports"][0]["lengths"][0]["accuracy"] = 0.99
    (model / card.EVALUATION).write_text(json.dumps(stored))
    assert (model / card.CARD).read_text() != card.of_directory(model)


def test_wrong_reports_write_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "needle.json").write_text(json.dumps({**COMMON, "kind": "greedy"}))
    assert made(model) == 2
    assert "kind 'greedy'" in capsys.readouterr().err
    (model.parent / "needle.json").write_text(json.dumps(NEEDLE))
    (model.parent / "log.jsonl").write_text('{"step": 1, "needle": {}}\n')
    assert made(model) == 2
    assert not (model / card.CARD).exists()


def test_planted_faults_are_named() -> None:
    assert "fault planted: index_topk:random" in card._how({**COMMON, "plants": ["index_topk:random"]})


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="the trained model is not in the repository yet: models/nano is missing")
def test_committed_card_is_up_to_date(tmp_path: Path) -> None:
    assert (COMMITTED / card.CARD).read_text(encoding="utf-8") == card.of_directory(COMMITTED)
    size = sum(p.stat().st_size for p in COMMITTED.rglob("*") if p.is_file())
    assert size <= 12_000_000
    # the comparison sees a single changed digit
    copy = tmp_path / "nano"
    shutil.copytree(COMMITTED, copy)
    text = (copy / card.CARD).read_text(encoding="utf-8")
    digit = re.search(r"needles found at \d+ tokens \| (\d)", text)
    assert digit is not None
    assert text[: digit.start(1)] + "0" + text[digit.end(1) :] != card.of_directory(copy)
