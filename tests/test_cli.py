"""The command line: exit codes, JSON keys, refusals before any work, and what the run file and the options decide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import v4
from ops.contract import CONTRACTS
from ops.registry import NoImplementation
from tests import tiny
from tools import doctor, generate
from tools.cli import main
from v4.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GENERATE_KEYS = {"text", "tokens", "tokens_per_second", "backend", "ops", "prompt_tokens", "prefill_seconds", "stopped"}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with the family's vocabulary, tokenizer and our prompt texts, made by the command line."""
    folder = tmp_path_factory.mktemp("talking")
    settings = tiny.config([0, 4, 128], vocab_size=129280, hidden_size=32, head_dim=32, moe_intermediate_size=32)
    (folder / "config.json").write_text(json.dumps(settings))
    assert main(["checkpoint", "make", "--config", str(folder / "config.json"), "--out", str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights would be loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded before the request was refused")

    monkeypatch.setattr(v4, "load", load)


class Fake:
    """Stands for v4.load and the model it returns; remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.binding = SimpleNamespace(table=lambda: [{"op": "rms_norm", "used": ["cpu"], "notes": {"cpu": "used"}}])
        monkeypatch.setattr(v4, "load", self.load)

    def load(self, path: str, **options: Any) -> Fake:
        self.loaded = {"path": path, **options}
        return self

    def generate(self, ids: list[int], max_new_tokens: int, *, on_token: Any, **options: Any) -> SimpleNamespace:
        self.asked = {"ids": ids, "max_new_tokens": max_new_tokens, **options}
        for token in (7, 8):
            on_token(token)
        return SimpleNamespace(tokens=[7, 8], tokens_per_second=1.5, prefill_seconds=0.1, stopped="length", acceptance=0.5)

    def explain(self) -> str:
        return "op table"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith(f"v4 {arguments[0]}: ")


# ---- the command itself ------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    code = "import sys, tools.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("generate", "doctor", "checkpoint", "plan"):
        assert verb in done.stdout


def test_unknown_verb_is_could_not_run() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generat"])
    assert stop.value.code == 2


@pytest.mark.parametrize(("error", "caught"), [(NoImplementation("rms_norm: no kernel"), True), (RuntimeError("bug"), False)])
def test_only_expected_errors_lose_their_traceback(
    error: Exception, caught: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(v4, "load", load)
    command = ["generate", "--model", str(tiny.checkpoint("window-only")), "--ids", "0,5"]
    if caught:
        refused(command, "rms_norm: no kernel", capsys)
    else:
        with pytest.raises(RuntimeError, match="bug"):
            main(command)


# ---- doctor -------------------------------------------------------------------------------------------------------------


def test_doctor_reports_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "versions", "dtype", "backends", "ops", "ok"}
    assert found["ok"] is True
    assert {b["name"] for b in found["backends"] if b["available"]} >= {"cpu"}
    assert {row["op"] for row in found["ops"]["cpu"]} == set(CONTRACTS)
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_shows_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--backend", "cpu"]) == 0
    assert f"{len(CONTRACTS)} of {len(CONTRACTS)} implemented" in capsys.readouterr().out
    # of an op that no other one is composed of
    monkeypatch.delitem(CONTRACTS["argmax"].impls, "cpu")
    assert main(["doctor", "--backend", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"{len(CONTRACTS) - 1} of {len(CONTRACTS)} implemented" in out
    assert any("argmax" in line and "MISSING  not written" in line for line in out.splitlines())


def test_doctor_tells_why_a_backend_is_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(name: str) -> None:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "load_backend", load)
    assert main(["doctor"]) == 1
    assert "not available: can not be imported: libhccl.so" in capsys.readouterr().out


def test_doctor_names_the_nearest_backend(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["doctor", "--backend", "cpuu"], "did you mean 'cpu'?", capsys)


def test_doctor_works_with_nothing_but_torch() -> None:
    absent = ("safetensors", "tokenizers", "yaml", "tqdm", "transformers", "rich", "huggingface_hub")
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nfrom tools.cli import main\nsys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "every op has an implementation" in done.stdout


def test_doctor_without_torch_says_so() -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom tools.cli import main\nsys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "torch is not installed" in done.stderr
    assert "Traceback" not in done.stderr


# ---- generate: what reaches the model -------------------------------------------------------------------------------------


def test_defaults_reach_the_model(fake: Fake) -> None:
    directory = tiny.checkpoint("window-only")
    assert main(["generate", "--model", str(directory), "--ids", "0,5,7"]) == 0
    assert fake.loaded["path"] == str(directory)
    assert (fake.loaded["backend"], fake.loaded["dtype"], fake.loaded["numerics"]) == ("cpu", torch.bfloat16, "exact")
    assert fake.loaded["ops"] is None and not fake.loaded["strict"] and not fake.loaded["batch_invariant"]
    assert fake.asked["ids"] == [0, 5, 7]
    assert (fake.asked["temperature"], fake.asked["top_p"], fake.asked["top_k"], fake.asked["seed"]) == (0.0, 1.0, 0, 0)


def test_options_win_over_the_run_file(fake: Fake, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {tiny.checkpoint('window-only')}\ndtype: float32\nseed: 3\ntemperature: 0.5\ntop_k: 9\nmax_new_tokens: 5\n"
        "context: 200\nstrict: true\nops: {rms_norm: cpu, rope: cpu}\n"
    )
    options = ["--seed", "4", "--ops", "rope=cpu_invariant", "--top-p", "0.25"]
    assert main(["generate", "--config", str(run), "--ids", "0", *options]) == 0
    assert fake.loaded["dtype"] == torch.float32
    assert fake.loaded["max_context"] == 200
    assert fake.loaded["strict"] is True
    assert fake.loaded["ops"] == {"rms_norm": "cpu", "rope": "cpu_invariant"}
    assert fake.asked["seed"] == 4
    assert fake.asked["max_new_tokens"] == 5
    assert (fake.asked["temperature"], fake.asked["top_k"], fake.asked["top_p"]) == (0.5, 9, 0.25)


def test_prompts_take_the_chat_format(fake: Fake, talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(talking)
    monkeypatch.setattr(generate, "Tokenizer", lambda path: tokenizer)

    def prompt(*arguments: str) -> str:
        assert main(["generate", "--model", str(talking), *arguments]) == 0
        return tokenizer.decode(fake.asked["ids"])

    assert prompt("Hi") == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"
    assert prompt("Hi", "--thinking").endswith("<｜Assistant｜><think>")
    assert prompt("Hi", "--raw") == "<｜begin▁of▁sentence｜>Hi"
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]))
    assert prompt("--chat", str(chat)) == "<｜begin▁of▁sentence｜>S<｜User｜>Hi<｜Assistant｜></think>"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}))
    assert '"name": "weather"' in prompt("--chat", str(chat))
    assert prompt("Hi", "--effort", "max") != prompt("Hi", "--thinking")


# ---- generate: end to end --------------------------------------------------------------------------------------------------


def test_generate_streams_what_json_reports(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(talking), "--max-new-tokens", "4", "--dtype", "float32", "Hello"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == GENERATE_KEYS | {"acceptance", "plants"} and found["plants"] == []
    assert len(found["tokens"]) == 4 or found["stopped"] == "stop"
    assert {row["op"] for row in found["ops"]} == set(CONTRACTS)
    assert found["text"] == Tokenizer(talking).decode(found["tokens"], skip_special=True)
    assert main([*command, "--explain"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(found["text"] + "\n")
    assert "sparse_attention" in captured.out
    assert "4 tokens at" in captured.err


def test_generate_plants_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(tiny.checkpoint("flash")), "--ids", "0,5,7", "--max-new-tokens", "6", "--json"]
    assert main(command) == 0
    right = json.loads(capsys.readouterr().out)
    assert main([*command, "--plant", "hc_head:mean@head", "--plant", "hc_post:one_element@layers.1#0"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["plants"] == ["hc_head:mean@head", "hc_post:one_element@layers.1#0"]
    assert "planted fault hc_post:one_element@layers.1#0: the largest element" in captured.err
    assert main([*command, "--plant", "linear:nan@layers.0"]) == 0
    broken = json.loads(capsys.readouterr().out)
    assert broken["tokens"] != right["tokens"]


def test_a_checkpoint_without_tokenizer_takes_and_gives_ids(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(tiny.checkpoint("flash")), "--ids", "0,5,7", "--max-new-tokens", "3", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == ",".join(map(str, found["tokens"]))
    assert main([*command, "--speculative"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == found["tokens"]


# ---- generate: refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown key 'modle'; did you mean 'model'?"),
        ("max_tokens: 3", "unknown key 'max_tokens'; did you mean 'max_new_tokens'?"),
        ("batch-invariant: true", "did you mean 'batch_invariant'?"),
        ("seed: abc", "seed: found 'abc', expected an integer"),
        ("strict: 1", "strict: found 1, expected true or false"),
        ("temperature: true", "temperature: found True, expected a number"),
        ("dtype: fp8", "dtype: found 'fp8', expected one of float32"),
        ("numerics: exakt", "numerics: found 'exakt'"),
        ("ops: cpu", "ops: found 'cpu', expected a mapping"),
        ("ops: {rope: 3}", "ops.rope: found 3"),
        ("- model", "found a list, expected a mapping"),
        ("a: b: c", "not YAML"),
    ],
)
@pytest.mark.usefixtures("no_load")
def test_wrong_run_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(text)
    refused(["generate", "--config", str(run), "--ids", "0"], message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "/nowhere/run.yaml"], "run.yaml: not found"),
        (["--model", "/nowhere"], "/nowhere: no such directory"),
        ([], "found no checkpoint; give --model DIR"),
        (["--model", "{tiny}"], "found no prompt"),
        (["--model", "{tiny}", "text"], "has no tokenizer.json; give token ids"),
        (["--model", "{tiny}", "--ids", "0,a"], "--ids: found '0,a'"),
        (["--model", "{tiny}", "--ids", "0", "--max-new-tokens", "20000"], "exceed the context of 16384"),
        (["--model", "{tiny}", "--ids", "0,1,2", "--max-new-tokens", "8", "--context", "10"], "exceed the context of 10"),
        (["--model", "{tiny}", "--ids", "0", "--speculative", "--temperature", "1"], "leave --temperature at 0"),
        (["--model", "{tiny}", "--ids", "0", "--cuda-graph"], "backend 'cpu' does not record steps"),
        (["--model", "{tiny}", "--ids", "0", "--cuda-graph", "--backend", "cuda", "--speculative"], "leave --speculative off"),
        (["--model", "{tiny}", "--ids", "0", "--cuda-graph", "--backend", "cuda", "--plant", "rope:nan"], "leave --plant off"),
        (["--model", "{tiny}", "--ids", "0", "--ops", "rope"], "found 'rope', expected op=backend"),
        (["--model", "{talking}", "--chat", "/nowhere.json"], "nowhere.json: not found"),
        (["--model", "{talking}", "--effort", "extreme", "Hi"], "extreme"),
        (["--model", "{tiny}", "--ids", "0", "--plant", "rope"], "expected OP:MUTANT"),
        (["--model", "{tiny}", "--ids", "0", "--plant", "rope:nan@layers.77"], "the model has no part 'layers.77'"),
        (["--model", "{tiny}", "--ids", "0", "--plant", "rope:nan@hed"], "did you mean 'head'?"),
    ],
)
@pytest.mark.usefixtures("no_load")
def test_wrong_requests_are_refused(
    arguments: list[str], message: str, talking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{tiny}": str(tiny.checkpoint("window-only")), "{talking}": str(talking)}
    refused(["generate", *(places.get(a, a) for a in arguments)], message, capsys)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{", "not JSON"),
        ("{}", "found a dict without messages"),
        ('{"messages": [], "tols": []}', "unknown key 'tols'; did you mean 'tools'?"),
        ('[{"role": "usr", "content": "x"}]', "found role 'usr'"),
        ("[]", "expected a list with at least one message"),
    ],
)
@pytest.mark.usefixtures("no_load")
def test_wrong_conversations_are_refused(
    chat: str, message: str, talking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.json"
    file.write_text(chat)
    refused(["generate", "--model", str(talking), "--chat", str(file)], message, capsys)


# ---- checkpoint ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tensors", "billions"), [("flash", 69187, 284.33), ("pro", 145116, 1572.99)])
def test_checkpoint_plan(name: str, tensors: int, billions: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "plan", "--config", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"] == tensors
    assert found["parameters"] / 1e9 == pytest.approx(billions, abs=0.005)
    assert found["bytes"] == sum(row["bytes"] for row in found["by_dtype"].values()) == found["per_rank"][0]["bytes"]


def test_checkpoint_plan_prints_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "plan", "--config", "nano", "--ranks", "2"]) == 0
    assert "published count" in capsys.readouterr().out


def test_checkpoint_make_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    command = ["checkpoint", "make", "--config", "tiny", "--seed", "5", "--json", "--out"]
    assert main([*command, str(first)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tensors"] > 100 and made["tokenizer"] is False
    assert main([*command, str(second)]) == 0
    capsys.readouterr()
    for file in first.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file
    assert main(["checkpoint", "verify", str(first)]) == 0
    assert "sound" in capsys.readouterr().out
    shard = sorted(first.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["checkpoint", "verify", str(first), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["findings"][0]["file"] == shard.name
    assert main(["checkpoint", "verify", str(first)]) == 1
    assert shard.name in capsys.readouterr().out


def test_checkpoint_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["checkpoint", "verify", str(tmp_path / "nowhere")], "no such directory", capsys)
    refused(["checkpoint", "plan", "--config", "nanoo"], "did you mean 'nano'?", capsys)
    refused(["checkpoint", "plan", "--config", "flash", "--ranks", "7"], "7 ranks", capsys)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "model.safetensors.index.json").write_text("{}")
    refused(["checkpoint", "make", "--config", "tiny", "--out", str(taken)], "found model.safetensors.index.json", capsys)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    command = ["checkpoint", "make", "--config", "flash", "--out", str(tmp_path / "new")]
    refused(command, "takes 159.6 GB, 1.0 GB are free", capsys)
    assert not (tmp_path / "new").exists()
