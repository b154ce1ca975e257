"""The ways in which v4 compare asks an endpoint, and the forms and names of tokens that it reads.

The endpoint answers from a tiny model with the family's vocabulary; `truth` are that model's own log-probabilities.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import v4
from tests import tiny
from tests.endpoint import Endpoint, Reply, Row, at, serving, shifted
from tools.cli import main
from tools.compare.answers import Entry, Unsuitable, completion, native, prompt_logprobs
from tools.compare.client import Client, EndpointError, base_url
from tools.compare.measure import measure, named_ids
from tools.compare.names import Names
from tools.compare.prompts import Prompt
from tools.compare.scoring import score
from tools.compare.ways import Asker, Way, choose
from v4.tokenizer import BOS, Tokenizer

# the endpoint's model is loaded in float32 and runs the same prompt in other pieces: a few roundings
NEAR = 1e-4
TOP = 5
TEXT = "The ferry left at six, 龘 and 🦩 aboard; it was 1987."


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with the family's vocabulary and tokenizer."""
    folder = tmp_path_factory.mktemp("talking")
    settings = tiny.config([0, 4, 128], vocab_size=129280, hidden_size=32, head_dim=32, moe_intermediate_size=32)
    (folder / "config.json").write_text(json.dumps(settings))
    assert main(["checkpoint", "make", "--config", str(folder / "config.json"), "--out", str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def tokenizer(talking: Path) -> Tokenizer:
    return Tokenizer(talking)


@pytest.fixture(scope="module")
def server(talking: Path, tokenizer: Tokenizer) -> Iterator[Endpoint]:
    model = v4.load(str(talking), backend="cpu", dtype=torch.float32, mtp=False)
    with serving(model, tokenizer) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def names(tokenizer: Tokenizer) -> Names:
    return Names(tokenizer, 129280)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> Prompt:
    return Prompt("t", tuple(tokenizer.encode(BOS + TEXT)), BOS + TEXT)


@pytest.fixture
def asker(endpoint: Endpoint, names: Names) -> Asker:
    return Asker(Client(endpoint.url, timeout=30, retries=0), "tiny", names, TOP)


@pytest.fixture(scope="module")
def truth(server: Endpoint, prompt: Prompt) -> torch.Tensor:
    """Row i: log-probabilities of token i + 1."""
    return torch.log_softmax(server.model.logits(list(prompt.ids)).float(), -1)


# ---- every form of answer -------------------------------------------------------------------------------------------------------

ECHO, ECHO_PLAIN, STEPS, STEPS_PLAIN = Way("echo", extras=True), Way("echo"), Way("steps", extras=True), Way("steps")


@pytest.mark.parametrize(
    ("way", "settings", "exact"),
    [
        (ECHO, {}, True),
        (ECHO_PLAIN, {"strict": True}, False),
        (ECHO_PLAIN, {"strict": True, "naming": "bytes"}, True),
        (ECHO_PLAIN, {"strict": True, "naming": "vocabulary"}, True),
        (ECHO_PLAIN, {"strict": True, "naming": "number"}, True),
        (ECHO_PLAIN, {"strict": True, "chat_form": True}, True),
        (ECHO_PLAIN, {"strict": True, "naming": "none"}, None),
        (Way("echo", text=True, extras=True), {"takes": {"text"}}, True),
        (Way("echo", text=True), {"takes": {"text"}, "strict": True}, False),
        (Way("prompt-logprobs", extras=True), {"accepts": {"prompt-logprobs"}}, True),
        (Way("prompt-logprobs", text=True, extras=True), {"accepts": {"prompt-logprobs"}, "takes": {"text"}}, True),
        (Way("generate"), {"accepts": {"generate"}}, True),
        (Way("generate", text=True), {"accepts": {"generate"}, "takes": {"text"}}, True),
        (STEPS, {"accepts": {"steps"}}, True),
        (STEPS_PLAIN, {"accepts": {"steps"}, "strict": True, "naming": "bytes"}, True),
        (STEPS_PLAIN, {"accepts": {"steps"}, "strict": True, "chat_form": True}, True),
        (STEPS_PLAIN, {"accepts": {"steps"}, "strict": True}, False),
    ],
    ids=str,
)
def test_every_form_is_found_and_read(
    way: Way, settings: dict[str, Any], exact: bool | None, endpoint: Endpoint, names: Names, prompt: Prompt, truth: torch.Tensor
) -> None:
    for name, value in settings.items():
        setattr(endpoint, name, value)
    asker = Asker(Client(endpoint.url, timeout=30, retries=0), "tiny", names, TOP, stride=4)
    found, answer = choose(asker, prompt, "auto", text=True)
    assert found == way
    assert (answer.same, answer.departure, answer.whole) == (len(prompt.ids), None, way.name != "steps")
    tops = named_ids(answer, names)
    asked = range(4, len(prompt.ids), 4) if way.name == "steps" else range(1, len(prompt.ids))
    for i, entry in enumerate(answer.entries):
        if i not in asked:
            assert entry.logprob is None and not entry.top
            continue
        likeliest = dict(zip(*(x.tolist() for x in reversed(truth[i - 1].topk(TOP))), strict=True))
        if exact is None:
            assert not entry.top
        elif exact:
            expected = (
                likeliest
                if entry.logprob is None or way.name != "prompt-logprobs"
                else {**likeliest, prompt.ids[i]: entry.logprob}
            )
            assert tops[i] == pytest.approx(expected, abs=NEAR)
        else:
            # a piece of a character has no text that names it
            assert tops[i] and all(likeliest[token] == pytest.approx(number, abs=NEAR) for token, number in tops[i].items())
        if way.name == "steps" and prompt.ids[i] not in likeliest:
            assert entry.logprob is None
        else:
            assert entry.logprob == pytest.approx(float(truth[i - 1, prompt.ids[i]]), abs=NEAR)


def test_steps_compare_the_tokens_that_are_among_the_likeliest(
    endpoint: Endpoint, names: Names, truth: torch.Tensor, prompt: Prompt
) -> None:
    # a text of likeliest tokens, one token at a time
    ids = [*prompt.ids[:3]]
    for _ in range(6):
        ids.append(int(endpoint.model.logits(ids)[-1].argmax()))
    greedy = Prompt("g", tuple(ids), None)
    asker = Asker(Client(endpoint.url, retries=0), "tiny", names, TOP, stride=2)
    endpoint.tamper = shifted(6, -1.0)
    answer = asker.ask(STEPS, greedy)
    result = measure(
        greedy, answer, named_ids(answer, names), score(endpoint.model, ids, [list(e.top) for e in answer.entries]), names, 0.5
    )
    sent = [len(body["prompt"]) for _, body, _ in endpoint.requests]
    assert sent == [2, 4, 6, 8]
    assert (result.compared, result.first, result.begins, result.missing_first) == (3, 6, 6, None)
    assert result.top1_compared == 4 and result.missing == len(ids) - 1 - 3
    far = Asker(asker.client, "tiny", names, TOP, stride=100)
    assert [i for i, entry in enumerate(far.ask(STEPS, greedy).entries) if entry.top] == [len(ids) - 1]


# ---- other tokens than ours -----------------------------------------------------------------------------------------------------


def _shortened(ids: list[int]) -> list[int]:
    return ids[:-3]


def _lengthened(ids: list[int]) -> list[int]:
    return [*ids, 7, 8]


def _split(ids: list[int]) -> list[int]:
    # " left" as two tokens
    return [*ids[:3], *SPLIT, *ids[4:]]


SPLIT = (325, 74)


@pytest.mark.parametrize("name", ["echo", "generate", "prompt-logprobs"])
@pytest.mark.parametrize(
    ("change", "position", "ours", "theirs"),
    [(_shortened, -3, None, "(end)"), (_lengthened, None, "(end)", None), (_split, 3, " left", None)],
)
def test_where_a_server_reads_the_text_otherwise(
    change: Callable[[list[int]], list[int]], position: int | None, ours: str | None, theirs: str | None, name: str,
    asker: Asker, endpoint: Endpoint, prompt: Prompt, names: Names, tokenizer: Tokenizer
) -> None:  # fmt: skip
    endpoint.tokenise = lambda text: change(tokenizer.encode(text))
    answer = asker.ask(Way(name, text=True, extras=name != "generate"), prompt)
    place = len(prompt.ids) + (position or 0) if position is None or position < 0 else position
    # after a text that ends early, some answers go on with the token that was generated
    read = [*change(list(prompt.ids)), endpoint.generated] if name == "echo" else change(list(prompt.ids))
    shown = theirs if theirs and place >= len(read) else names.text(read[place])
    assert answer.departure == (place, ours or names.text(prompt.ids[place]), shown)
    assert answer.same == place and len(answer.entries) == len(prompt.ids)
    assert all(entry == Entry() for entry in answer.entries[place:])


def test_a_server_that_adds_its_own_bos(asker: Asker, endpoint: Endpoint, prompt: Prompt, tokenizer: Tokenizer) -> None:
    endpoint.adds_bos = True
    # vLLM can be told to leave it out
    assert asker.ask(Way("echo", text=True, extras=True), prompt).departure is None
    answer = asker.ask(Way("echo", text=True), prompt)
    assert (answer.same, answer.departure) == (1, (1, "The", BOS))
    # rows of prompt_logprobs hold other tokens beside the prompt's: ours among them is no agreement
    endpoint.adds_bos, endpoint.tokenise = False, lambda text: [0, *tokenizer.encode(text)]

    def beside(row: Row) -> None:
        row.top[0] = (prompt.ids[1], row.top[0][1])

    endpoint.tamper = at(1, beside)
    answer = asker.ask(Way("prompt-logprobs", text=True, extras=True), prompt)
    assert answer.departure == (1, "The", BOS)


def test_tokens_without_names_must_be_as_many_as_ours(
    asker: Asker, endpoint: Endpoint, prompt: Prompt, tokenizer: Tokenizer
) -> None:
    endpoint.naming = "none"
    assert asker.ask(Way("echo", text=True), prompt).same == len(prompt.ids)
    endpoint.tokenise = lambda text: _split(tokenizer.encode(text))
    endpoint.tamper = lambda rows: [*rows, Row(7, -1.0, [])]
    with pytest.raises(Unsuitable, match=f"found {len(prompt.ids) + 3} tokens without names, expected the {len(prompt.ids)}"):
        asker.ask(Way("echo", text=True), prompt)


def test_missing_positions(asker: Asker, endpoint: Endpoint, prompt: Prompt) -> None:
    endpoint.tamper = lambda rows: rows[:5] + rows[7:]
    with pytest.raises(Unsuitable, match=f"found {len(prompt.ids) - 1} tokens, expected the {len(prompt.ids)}"):
        asker.ask(ECHO, prompt)


def test_the_way_that_reads_our_tokens_is_preferred(asker: Asker, endpoint: Endpoint, prompt: Prompt) -> None:
    endpoint.takes, endpoint.strict, endpoint.adds_bos = {"text"}, True, True
    assert choose(asker, prompt, "auto", text=True)[0] == Way("generate", text=True)
    endpoint.accepts = {"echo"}
    way, answer = choose(asker, prompt, "auto", text=True)
    assert way == Way("echo", text=True) and answer.departure == (1, "The", BOS)


@pytest.mark.parametrize(
    "guard", [Reply(403), Reply(302, headers={"Location": "/login"}), Reply(body=b"<html>"), Reply(how="drop")]
)
def test_a_guarded_path_does_not_end_the_search(guard: Reply, asker: Asker, endpoint: Endpoint, prompt: Prompt) -> None:
    endpoint.accepts, endpoint.takes, endpoint.guard = {"echo"}, {"text"}, guard
    endpoint.strict = endpoint.adds_bos = True
    assert choose(asker, prompt, "auto", text=True)[0] == Way("echo", text=True)
    with pytest.raises(EndpointError):
        choose(asker, prompt, "generate", text=True)


# ---- names of tokens ------------------------------------------------------------------------------------------------------------


def test_names_of_tokens(names: Names, tokenizer: Tokenizer) -> None:
    piece, whole = tokenizer.encode("龘")[0], tokenizer.encode(" left")[0]
    data = "bytes:" + "".join(f"\\x{b:02x}" for b in tokenizer.token_bytes(piece))
    assert "\ufffd" in names.text(piece)
    for found, token, same in [
        (whole, whole, True), (piece, whole, False), (" left", whole, True), ("left", whole, False), (None, whole, True),
        (data, piece, True), ("bytes:\\xe4", piece, False), ("\ufffd", piece, True), (data, whole, False), ("", 0, True), ("", whole, False),
    ]:  # fmt: skip
        assert names.same(found, token) is same, (found, token)
    assert names.resolve(data) == piece and names.resolve(" left") == whole and names.resolve(whole) == whole
    assert names.resolve("\ufffd") is names.resolve(129280) is names.resolve(-1) is names.resolve(" left behind") is None
    alone = Names(None, 512)
    assert alone.same("anything", 7) and not alone.same(8, 7) and alone.resolve("a") is None and alone.text(7) == "7"


def test_pieces_of_surrogates_can_be_reported(asker: Asker, endpoint: Endpoint, prompt: Prompt) -> None:
    body = {"tokens": [BOS, "\ud83e", "x"], "token_logprobs": [None, -1.0, -1.0], "top_logprobs": None}
    endpoint.always = Reply(body=json.dumps({"choices": [{"logprobs": body}]}).encode())
    answer = asker.ask(Way("echo", text=True), prompt)
    assert answer.departure == (1, "The", "?")


# ---- answers that are none ------------------------------------------------------------------------------------------------------

_COLUMNS = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"b": -1.0}]}
_CONTENT = {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -1.0}]}]}
_VLLM = {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0, "rank": 1}}], "prompt_token_ids": [0, 5]}]}
_NATIVE = {
    "meta_info": {"input_token_logprobs": [[None, 0, None], [-1.0, 5, "b"]], "input_top_logprobs": [None, [[-1.0, 5, "b"]]]}
}
_JUNK = [None, True, -1, 3.5, -(10**400), 10**400, "x", "token_id:²", [], {}, [[]], [None], {"²": -1.0}, {"5": "x"}, "\ud800"]


def _damaged(body: Any) -> Iterator[Any]:
    """The body with junk in the place of each of its parts."""

    def paths(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            yield from paths(node[key], (*path, key))

    for path in paths(body, ()):
        for junk in _JUNK:
            damaged: Any = {"": copy.deepcopy(body)}
            node = damaged
            for key in ("", *path)[:-1]:
                node = node[key]
            node[("", *path)[-1]] = junk
            yield damaged[""]


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (completion, {"choices": [{"logprobs": _COLUMNS, "prompt_token_ids": [0, 5]}]}),
        (completion, {"choices": [{"logprobs": _CONTENT}]}),
        (lambda body: prompt_logprobs(body, [0, 5]), _VLLM),
        (native, _NATIVE),
    ],
)
def test_damaged_answers_are_refused_or_read(read: Callable[[Any], list[Entry]], body: Any) -> None:
    assert read(body)
    refused: list[int] = []
    for damaged in _damaged(body):
        try:
            read(damaged)
        except Unsuitable as error:
            refused.append(len(str(error)))
    assert len(refused) > 30 and max(refused) < 400


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, "expected a log-probability"), (float("inf"), "at most 0"), ("-1", "expected a number")]
)
def test_what_is_no_log_probability(value: object, message: str) -> None:
    with pytest.raises(Unsuitable, match=message):
        completion({"choices": [{"logprobs": {**_COLUMNS, "token_logprobs": [None, value]}}]})


# ---- the whole command ----------------------------------------------------------------------------------------------------------


def test_text_that_a_server_reads_otherwise_is_beyond_the_threshold(
    endpoint: Endpoint, talking: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "report.json"
    file.write_text(json.dumps({"id": "ferry", "text": TEXT}))
    command = ["compare", "--model", str(talking), "--against", endpoint.url, "--prompts", str(file), "--dtype", "float32"]
    endpoint.takes, endpoint.tokenise = {"text"}, lambda text: _split(tokenizer.encode(text))
    assert main([*command, "--out", str(out)]) == 1
    row = json.loads(out.read_text())["prompts"][0]
    read = tokenizer.decode(SPLIT[:1])
    assert row["tokenisation"] == {"position": 3, "ours": " left", "theirs": read}
    assert (row["begins"], row["compared"], row["unaligned"]) == (3, 2, row["tokens"] - 2)
    said = f'token 3: the server reads "{read}" where we read " left"; {row["unaligned"]} tokens from there on are not compared'
    assert said in capsys.readouterr().out
    # a prompt that no text encodes to can not go to a server that takes text only, whatever the shortest one is
    file.write_text(json.dumps({"text": "a b"}) + "\n" + json.dumps({"ids": [2715, 5, 7, 9, 11, 13]}))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "found no way" in said and "with text" not in said


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/a/v2/completions", "https://host/a/v2"),
    ],
)
def test_the_base_of_a_url(given: str, base: str) -> None:
    assert base_url(given) == base
