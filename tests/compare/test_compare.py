"""v4 compare against an endpoint on 127.0.0.1 that answers from our own model: what it finds, says, keeps and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import v4
from tests import tiny
from tests.endpoint import LENGTHS, Endpoint, Reply, Row, Run, at, shifted
from tools.compare import scoring
from tools.compare.measure import divergence
from tools.compare.prompts import Reader
from v4.prompt_texts import PromptTexts
from v4.tokenizer import BOS, Tokenizer, find_family_tokenizer, make_v4_tokenizer

# prefills cut differently add up in another order, by a few float32 roundings
NEAR = 1e-4
HEAD = {"model", "endpoint", "name", "way", "backend", "dtype", "numerics", "threshold", "yardstick", "sliding_window"}
_SUMMARY = (
    "prompts tokens compared missing unaligned departing earliest worst mean_abs not_finite top1_compared top1_disagreements "
    "kl_mean noise_mean noise_max within"
)
_ROW = (
    "id tokens compared missing missing_first unaligned first first_token first_ours first_theirs worst worst_position mean_abs "
    "not_finite top1_compared top1_disagreements top1_first kl_positions kl_mean kl_max tokenisation noise_mean noise_max ids ours "
    "theirs begins"
)
SUMMARY, ROW = set(_SUMMARY.split()), set(_ROW.split())


# ---- differences, and where they begin ------------------------------------------------------------------------------------------


def test_an_equal_deployment_is_within(run: Run, endpoint: Endpoint) -> None:
    found = run.json(code=0)
    assert set(found) == HEAD | {"prompts", "summary", "stopped"} and set(found["summary"]) == SUMMARY
    assert all(set(row) == ROW for row in found["prompts"])
    assert [row["id"] for row in found["prompts"]] == ["p0", "p1", "p2"]
    assert found["name"] == "tiny" and found["way"] == "echo with token ids and vLLM fields" and found["stopped"] is None
    s = found["summary"]
    assert s["tokens"] == s["compared"] == s["top1_compared"] == sum(LENGTHS) - 3
    assert s["within"] is True and s["departing"] == s["missing"] == s["unaligned"] == s["top1_disagreements"] == 0
    assert abs(s["worst"]) < NEAR and 0 <= s["kl_mean"] < NEAR and s["earliest"] is None
    # the probe's answer is used again: the list of models and one request a prompt
    assert [path for path, _, _ in endpoint.requests] == ["/v1/models"] + ["/v1/completions"] * 3
    sent = endpoint.requests[1][1]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["logprobs"]) == (1.0, 1.0, 1, 5)
    assert "within the threshold of 0.5" in run.text(code=0)


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    assert [key for key in sorted(HEAD | SUMMARY | ROW | {"prompts", "summary", "stopped"}) if f"`{key}`" not in page] == []


@pytest.mark.parametrize(("first", "by"), [(1, -0.75), (5, -0.75), (8, 1.25)])
def test_where_a_constant_difference_begins(first: int, by: float, run: Run, endpoint: Endpoint) -> None:
    endpoint.tamper = shifted(first, by)
    found = run.json(code=1)
    for row, length in zip(found["prompts"], LENGTHS, strict=True):
        assert (row["begins"], row["first"]) == (first, first)
        assert row["first_theirs"] - row["first_ours"] == pytest.approx(by, abs=NEAR)
        assert row["worst"] == pytest.approx(by, abs=NEAR) and row["worst_position"] >= first
        assert row["mean_abs"] == pytest.approx(abs(by) * (length - first) / (length - 1), abs=NEAR)
        assert row["theirs"][0] is None and row["theirs"][first] - row["ours"][first] == pytest.approx(by, abs=NEAR)
        assert row["top1_disagreements"] == 0
    s = found["summary"]
    assert (s["departing"], s["earliest"], s["within"]) == (3, first, False)
    assert s["mean_abs"] == pytest.approx(abs(by) * (sum(LENGTHS) - 3 * first) / (sum(LENGTHS) - 3), abs=NEAR)
    out = run.text(code=1)
    assert f"3 prompts depart (threshold 0.5), the earliest at token {first}" in out and f"token {first} " in out
    assert run.json("--threshold", f"{abs(by) + 0.01}", code=0)["summary"]["within"] is True


def test_the_table_begins_with_the_earliest(run: Run, endpoint: Endpoint) -> None:
    endpoint.tamper = lambda rows: shifted(3, -1.0)(rows) if len(rows) == LENGTHS[2] + 1 else shifted(7, -1.0)(rows)
    rows = [line.split()[:2] for line in run.text(code=1).splitlines() if line.startswith("p") and line[1].isdigit()]
    assert rows == [["p2", "3"], ["p0", "7"], ["p1", "7"]]


def test_another_likeliest_token(run: Run, endpoint: Endpoint, model: v4.LoadedModel) -> None:
    place = 6
    ids = tiny.tokens(LENGTHS[0], seed=0)
    best, second = torch.log_softmax(model.logits(ids), -1)[place - 1].topk(2).values.tolist()

    def swap(row: Row) -> None:
        (a, high), (b, low) = row.top[:2]
        row.top[:2] = [(b, high), (a, low)]

    endpoint.tamper = at(place, swap)
    lead = best - second
    found = run.json("--limit", "1", "--threshold", f"{lead - NEAR}", code=1)["prompts"][0]
    assert (found["begins"], found["top1_first"], found["top1_disagreements"], found["first"]) == (place, place, 1, None)
    assert found["kl_max"] > 10 * NEAR
    found = run.json("--limit", "1", "--threshold", f"{lead + NEAR}", code=0)["prompts"][0]
    assert found["top1_disagreements"] == 0 and found["top1_compared"] == LENGTHS[0] - 1


def _own(value: float | None) -> Any:
    def change(row: Row) -> None:
        row.logprob = value

    return change


def _one_of_the_likeliest(row: Row) -> None:
    row.top[1] = (row.top[1][0], math.nan)


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        (_own(math.nan), "not_finite"),
        (_own(-math.inf), "not_finite"),
        (_own(-9999.0), "not_finite"),
        (_own(None), "missing"),
        (_one_of_the_likeliest, "not_finite"),
    ],
)
@pytest.mark.parametrize("way", ["echo", "prompt-logprobs", "generate"])
def test_what_is_no_number_is_a_difference(change: Any, counted: str, way: str, run: Run, endpoint: Endpoint) -> None:
    endpoint.tamper = at(4, change)
    found = run.json("--way", way, code=1)
    assert [row["begins"] for row in found["prompts"]] == [4, 4, 4]
    assert found["summary"][counted] == 3
    assert found["summary"]["mean_abs"] < NEAR and abs(found["summary"]["worst"]) < NEAR
    assert all(row["theirs"][4] is None for row in found["prompts"])


def test_the_mean_is_of_what_is_finite(run: Run, endpoint: Endpoint) -> None:
    endpoint.tamper = lambda rows: at(4, _own(math.nan))(shifted(1, 0.3)(rows)) if len(rows) > LENGTHS[2] else rows
    mean = run.json(code=1)["summary"]["mean_abs"]
    assert mean == pytest.approx(0.3 * (LENGTHS[2] - 2) / (sum(LENGTHS) - 4), abs=NEAR / 10)


def test_zero_tokens_compared_are_no_pass(run: Run, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.accepts = {"steps"}
    out = tmp_path / "report.json"

    def others(rows: list[Row]) -> list[Row]:
        rows[-1].top = [(511 if token != 511 else 510, number) for token, number in rows[-1].top[:1]]
        return rows

    endpoint.tamper = others
    # every token leads by less than this: the likeliest being another one does not count
    found = run.json("--stride", "4", "--threshold", "30", "--out", str(out), code=2)
    assert found["summary"]["compared"] == 0 and found["summary"]["within"] is None
    assert "no verdict" in run.err
    assert json.loads(out.read_text())["summary"]["within"] is None
    endpoint.accepts, endpoint.tamper = {"echo"}, lambda rows: [Row(row.token, None, []) for row in rows]
    run.text(code=2)
    assert "every log-probability of the prompt is null" in run.err


def test_yardstick(run: Run, prompts: Path, model: v4.LoadedModel) -> None:
    other = v4.load(str(tiny.checkpoint("window-only")), backend="cpu", dtype=torch.bfloat16, mtp=False)
    apart = []
    for line in prompts.read_text().splitlines():
        ids = json.loads(line)["ids"]
        both = [torch.log_softmax(m.logits(ids).float(), -1)[range(len(ids) - 1), ids[1:]] for m in (model, other)]
        apart.append((both[0] - both[1]).abs())
    found = run.json("--yardstick", code=0)
    assert found["yardstick"] == "bfloat16"
    assert found["summary"]["noise_max"] == pytest.approx(float(torch.cat(apart).max()), abs=NEAR) != 0
    assert found["summary"]["noise_mean"] == pytest.approx(float(torch.cat(apart).mean()), abs=NEAR)
    assert [row["noise_max"] for row in found["prompts"]] == pytest.approx([float(a.max()) for a in apart], abs=NEAR)
    out = run.text("--yardstick", "--threshold", "0.0005", code=0)
    assert "yardstick: our float32 and bfloat16" in out and "may be rounding" in out
    assert run.json(code=0)["summary"]["noise_max"] is None


def test_a_failing_yardstick_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = v4.load

    def fails(path: str, **options: Any) -> v4.LoadedModel:
        if options["dtype"] == torch.bfloat16:
            raise ValueError("no room")
        return load(path, **options)

    monkeypatch.setattr(v4, "load", fails)
    found = run.json("--yardstick", code=2)
    assert found["summary"]["compared"] == sum(LENGTHS) - 3 and found["yardstick"] is None
    assert found["stopped"] == "the yardstick in bfloat16: no room" and "no room" in run.err


def test_divergence() -> None:
    p, q = [0.5, 0.25, 0.125], [0.25, 0.5, 0.125]
    ours, theirs = ({i: math.log(x) for i, x in enumerate(row)} for row in (p, q))
    # the bucket of all others holds 1/8 on both sides
    assert divergence(ours, theirs) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    assert divergence({0: -0.0}, {0: 1e-3}) >= 0


def test_scores_do_not_depend_on_chunks(model: v4.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokens(37)
    logprobs_TV = torch.log_softmax(model.logits(ids).float(), -1)
    monkeypatch.setattr(scoring, "CHUNK", 16)
    monkeypatch.setattr(scoring, "ROWS", 5)
    scores = scoring.score(model, ids, [[i] for i in range(37)])
    assert len(scores) == 36
    for i, score in enumerate(scores):
        best, second = logprobs_TV[i].topk(2).values.tolist()
        assert score.logprob == pytest.approx(float(logprobs_TV[i, ids[i + 1]]), abs=NEAR)
        assert score.best == int(logprobs_TV[i].argmax()) and score.margin == pytest.approx(best - second, abs=NEAR)
        assert score.asked[i + 1] == pytest.approx(float(logprobs_TV[i, i + 1]), abs=NEAR)


# ---- the report file ------------------------------------------------------------------------------------------------------------


def test_the_report_is_kept_after_every_prompt(run: Run, endpoint: Endpoint, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    seen: list[tuple[int, str | None, bool | None]] = []

    def watch() -> None:
        report = json.loads(out.read_text()) if out.exists() else {"prompts": [], "stopped": None, "summary": {"within": None}}
        seen.append((len(report["prompts"]), report["stopped"], report["summary"]["within"]))

    endpoint.watch = watch
    found = run.json("--out", str(out), code=0)
    # the first request is the probe, of the shortest prompt, which stands second
    assert seen == [(0, None, None), (0, None, None), (2, "not finished, 2 of 3 prompts done", None)]
    assert json.loads(out.read_text()) == found
    assert list(tmp_path.iterdir()) == [out]


def test_a_report_is_replaced_only_when_allowed(run: Run, endpoint: Endpoint, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    out.write_text("before")
    run.text("--out", str(out), code=2)
    assert "exists; give another name, or --overwrite" in run.err
    assert not endpoint.requests and out.read_text() == "before"
    # a run that finishes no prompt leaves what was there: the probe succeeds, the first prompt does not
    endpoint.script = [None, None, *[Reply(503)] * 3]
    run.text("--out", str(out), "--overwrite", code=2)
    assert "prompt p0 (0 of 3 done)" in run.err and out.read_text() == "before"
    run.text("--out", str(out), "--overwrite", code=0)
    assert json.loads(out.read_text())["summary"]["within"] is True


def test_a_failure_on_the_way_keeps_what_was_found(run: Run, endpoint: Endpoint, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    endpoint.script = [None, None, None, Reply(400, b"prompt too long")]
    found = run.json("--out", str(out), code=2)
    assert [row["id"] for row in found["prompts"]] == ["p0", "p1"] and found["summary"]["within"] is None
    assert found["stopped"] == "prompt p2 (2 of 3 done): HTTP 400: prompt too long"
    assert json.loads(out.read_text()) == found
    assert f"2 finished prompts are in {out}" in run.err
    endpoint.script, endpoint.tamper = [None, None, None, Reply(400)], shifted(2, -1.0)
    assert run.json(code=2)["summary"]["within"] is False
    out.unlink()
    endpoint.reset()
    # a directory in the way of the file that becomes the report
    out.with_name("report.json.part").mkdir()
    found = run.json("--out", str(out), code=2)
    assert "can not be written: Is a directory" in found["stopped"] and found["summary"]["compared"] == LENGTHS[0] - 1


# ---- refused before the endpoint is asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0"], "--threshold: found 0.0"),
        (["--threshold", "nan"], "--threshold: found nan"),
        (["--top-logprobs", "0"], "--top-logprobs: found 0"),
        (["--stride", "0"], "--stride: found 0"),
        (["--way", "steps"], "--stride 16"),
        (["--limit", "0"], "--limit: found 0"),
        (["--timeout", "0"], "--timeout: found 0.0"),
        (["--timeout", "inf"], "--timeout: found inf"),
        (["--retries", "-1"], "--retries: found -1"),
        (["--model", "/nowhere"], "/nowhere: no such directory"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["--out", "/nowhere/report.json"], "is in no directory"),
        (["--out", "/"], "is a directory"),
        (["--against", "localhost:8000"], "found no http(s) URL"),
        (["--against", "ftp://127.0.0.1/v1"], "found no http(s) URL"),
        (["--against", "http://user:pa55@127.0.0.1/v1"], "found a URL with user"),
        (["--against", "http://127.0.0.1/v1?key=pa55"], "found a URL with user"),
        (["--against", "http://127.0.0.1/v 1"], "without spaces"),
    ],
)
def test_wrong_requests_are_refused(options: list[str], message: str, run: Run, endpoint: Endpoint) -> None:
    run.text(*options, code=2)
    assert message in run.err and "pa55" not in run.err and not endpoint.requests


# ---- prompts ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_v4_tokenizer(find_family_tokenizer(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def texts() -> PromptTexts:
    return PromptTexts.from_checkpoint(tiny.checkpoint("window-only"))


def test_built_in_prompts_are_texts_of_the_family(tokenizer: Tokenizer, texts: PromptTexts) -> None:
    found = Reader(tokenizer, texts, 129280, 4096).read(None)
    assert len(found) >= 10 and len({prompt.id for prompt in found}) == len(found)
    for prompt in found:
        assert prompt.text is not None and prompt.text.startswith(BOS)
        assert tuple(tokenizer.encode(prompt.text)) == prompt.ids and prompt.ids.count(0) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "found no prompts"),
        ("{", "p.jsonl:1: not JSON"),
        ("[1]", "p.jsonl:1: found a list"),
        ('{"txt": "a"}', "unknown key 'txt'; did you mean 'text'?"),
        ('{"id": "a"}', "found no prompt, expected one of text, messages, ids"),
        ('{"text": "a", "ids": [1]}', "found text and ids"),
        ('{"text": 5}', "text is a int"),
        ('{"text": ""}', "found 1 tokens, expected at least 2"),
        ('{"text": "a", "mode": "chat"}', "mode belongs to messages"),
        ('{"messages": []}', "p.jsonl:1: messages: found"),
        ('{"messages": [{"role": "user", "content": "a"}], "mode": "cat"}', "did you mean 'chat'?"),
        ('{"ids": [0, 129280]}', "expected a list of integers in"),
        ('{"ids": [0, true]}', "expected a list of integers in"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"id": "\\ud800", "text": "a"}', "half of a surrogate pair"),
        ('{"id": 1, "text": "a"}\n\n{"id": "1", "text": "b"}', "p.jsonl:3: id '1' stands in line 1"),
        ('{"text": "' + "a b" * 40 + '"}', "the model takes 40; shorten"),
    ],
)
def test_wrong_prompts_are_refused(lines: str, message: str, tmp_path: Path, tokenizer: Tokenizer, texts: PromptTexts) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(lines)
    with pytest.raises(ValueError) as error:
        Reader(tokenizer, texts, 129280, 40).read(file)
    assert message in str(error.value)


def test_prompts_of_every_kind(tmp_path: Path, tokenizer: Tokenizer, texts: PromptTexts) -> None:
    reader, file = Reader(tokenizer, texts, 129280, 99), tmp_path / "p.jsonl"
    rows = [
        {"text": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"ids": tokenizer.encode("Hi there")},
        {"ids": [2715, 5]},
    ]
    file.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = reader.read(file)
    assert [prompt.text for prompt in found] == [
        BOS + "Hi", "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>", "Hi there", None
    ]  # fmt: skip
    assert [prompt.id for prompt in found] == ["1", "2", "3", "4"] and len(reader.read(file, 2)) == 2
    lines = tmp_path / "p.txt"
    lines.write_text(f"Hi\r\n\n  there\n{BOS}Hi there\n")
    assert [prompt.text for prompt in reader.read(lines)] == [BOS + "Hi", BOS + "  there", BOS + "Hi there"]
    with pytest.raises(ValueError, match="give ids with --prompts"):
        Reader(None, reader.texts, 512, 99).read(None)
    with pytest.raises(ValueError, match="expected .jsonl"):
        reader.read(tokenizer.path)
