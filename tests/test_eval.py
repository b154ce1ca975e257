"""The evaluations tell a model that can from one that can not, name wrong options, and need every planted fault reached."""

import json
import math
from argparse import Namespace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ops.mutants import MUTANTS, samples_by_size
from ops.registry import CONTRACTS
from tests import untrained_nano
from tests.test_nano_training import small
from tools.cli import main
from tools.eval import calls, needle
from tools.eval.model import Subject, interval
from tools.eval.ngram import Ngram
from tools.nano.batches import Encoder
from tools.nano.documents import tool_request
from v4.encoding import render_calls
from v4.tokenizer import EOS, Tokenizer


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return untrained_nano.checkpoint()


class Reader:
    """Stands for a model: reads the question in the prompt and looks the answer up, as far back as it can see."""

    def __init__(self, tokenizer: Tokenizer, sees: float) -> None:
        self.tokenizer, self.sees = tokenizer, sees

    def generate(self, ids: list[int], count: int, *, chunk: int) -> SimpleNamespace:
        text = self.tokenizer.decode(ids)
        question = text[text.rindex("What is the ") :].split("?")[0]
        lead = f"The {question.removeprefix('What is the ')} is"
        shown = text[int(len(text) * (1 - self.sees)) :]
        found = shown.partition(lead)[2].split(".")[0] if lead in shown else " 0 0 0"
        return SimpleNamespace(tokens=self.tokenizer.encode(f"{lead}{found}.{EOS}"))


def test_lengths_done_are_kept_when_a_run_is_cut_short(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    saved, done = tmp_path / "needle.json", needle.trial

    def cut(subject: Subject, encoder: Any, seed: int, length: int, depth: float, number: int) -> bool:
        if length == 200:
            raise KeyboardInterrupt
        return done(subject, encoder, seed, length, depth, number)

    monkeypatch.setattr(needle, "trial", cut)
    with pytest.raises(KeyboardInterrupt):
        main(["eval", "needle", "--model", str(checkpoint), "--trials", "2", "--lengths", "128,200", "--save", str(saved)])
    found = json.loads(saved.read_text())
    assert not found["complete"] and [(r["length"], r["trials"]) for r in found["lengths"]] == [(128, 2)]
    assert "     128       2" in capsys.readouterr().err


@pytest.mark.parametrize("sees, low, high", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.6), (0.0, 0.0, 0.05)])
def test_needle_counts_what_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sees: float, low: float, high: float) -> None:
    tokenizer = Tokenizer(checkpoint)
    model = SimpleNamespace(generate=Reader(tokenizer, sees).generate, max_context=4096, config=small())
    monkeypatch.setattr(needle, "open_model", lambda args: Subject(model, tokenizer, ()))
    args = Namespace(kind="needle", model="m", backend="cpu", dtype="float32", numerics="exact", seed=0, trials=40, plant=None, save=None)
    args.lengths, args.depths = "256,600", 10
    found = needle.report(args)
    for row in found["lengths"]:
        assert low <= row["accuracy"] <= high
        assert row["low"] <= row["accuracy"] <= row["high"]
    if sees == 0.5:
        assert all((d["right"] == d["trials"]) == (d["depth"] > 0.5) for d in found["lengths"][1]["by_depth"] if abs(d["depth"] - 0.5) > 0.06)


def test_whole_verb_with_picture(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, saved = tmp_path / "map.png", tmp_path / "found.json"
    options = ["--model", str(checkpoint), "--dtype", "float32", "--trials", "2", "--json", "--save", str(saved)]
    assert main(["eval", "needle", *options, "--lengths", "128,200", "--depths", "2", "--picture", str(picture), "--least", "0.5"]) == 1
    assert [r["accuracy"] for r in json.loads(capsys.readouterr().out)["lengths"]] == [0, 0]
    assert json.loads(saved.read_text())["kind"] == "needle"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["eval", "perplexity", *options, "--length", "64", "--ngram-tokens", "2000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fewer"] < 0 < found["ngram_bits_per_byte"] < found["bits_per_byte"]
    assert main(["eval", "tools", *options, "--trials", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["well_formed"] == 0


def test_planted_faults(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", "needle", "--model", str(checkpoint), "--dtype", "float32", "--trials", "1", "--lengths", "160"]
    assert main([*common, "--plant", "index_topk:random"]) == 0
    assert main([*common, "--plant", "index_topk:random@layers.0"]) == 2
    assert "was never reached" in capsys.readouterr().err
    assert main([*common, "--plant", "index_topk:random@layers.9"]) == 2
    assert "the model has no part 'layers.9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "/nowhere"], "no such directory"),
        (["--lengths", "64"], "found 64, expected at least 128"),
        (["--lengths", "a"], "expected integers"),
        (["--depths", "0"], "expected at least 1"),
        (["--trials", "0"], "expected at least 1"),
        (["--lengths", "2000000"], "the model takes 1048576"),
    ],
)
def test_wrong_options(checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["eval", "needle", "--model", str(checkpoint), *options]) == 2
    assert message in capsys.readouterr().err


def test_random_choice_is_a_choice() -> None:
    contract = CONTRACTS["index_topk"]
    wrong = MUTANTS["index_topk"]["random"].make(contract.reference)
    differs = 0
    for sample in islice(samples_by_size(contract, torch.float32, 0), 40):
        chosen, right = wrong(*sample.args, **sample.kwargs), contract.reference(*sample.args, **sample.kwargs)
        assert chosen.shape == right.shape
        assert torch.equal((chosen >= 0).sum(1), (right >= 0).sum(1))
        assert all(len(set(kept.tolist())) == len(kept) for row in chosen if len(kept := row[row >= 0]))
        differs += not torch.equal(chosen.sort(1).values, right.sort(1).values)
    assert differs > 5


def test_ngram_is_a_distribution() -> None:
    model = Ngram(7, order=3)
    model.learn([0, 1, 2, 1, 2, 3, 1, 2])
    for history in ([], [1], [1, 2], [5, 6], [2, 1]):
        assert math.isclose(sum(model.probability(history, w) for w in range(7)), 1)
    assert model.probability([1], 2) > model.probability([1], 3)
    assert model.bits([0, 1, 2]) < 2 * math.log2(7) < model.bits([0, 6, 5])


def test_calls_are_judged() -> None:
    from random import Random

    _, expected = tool_request(Random(3))
    function = expected["tool_calls"][0]["function"]
    good = f"I will do that.{render_calls([function])}{EOS}"
    assert calls.judge(good, expected) == (True, True)
    assert calls.judge(good.replace("</｜DSML｜invoke>", ""), expected) == (False, False)
    assert calls.judge(good.replace(function["name"], "other"), expected) == (True, False)
    assert calls.judge(f"No.{EOS}", expected) == (False, False)


def test_interval() -> None:
    assert interval(0, 200)[0] == 0
    assert interval(200, 200)[1] == 1
    low, high = interval(190, 200)
    assert 0.90 < low < 0.95 < high < 0.98


def test_encoder_of_the_checkpoint(checkpoint: Path) -> None:
    assert Encoder(Tokenizer(checkpoint))(" red box") == Tokenizer(checkpoint).encode(" red box")
