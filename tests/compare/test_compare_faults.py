"""v4 compare against an endpoint that misbehaves: what is tried again, what is refused and how clearly, and what happens to the key."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.endpoint import LENGTHS, Endpoint, Reply, Run, closed_port

# ---- the endpoint misbehaves ------------------------------------------------------------------------------------------------------


def _times(reply: Reply, count: int = 3) -> list[Reply | None]:
    return [reply] * count


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(401, b"who are you"), "HTTP 401, give a key with --api-key-env VAR: who are you"),
        (Reply(403), "HTTP 403, give a key"),
        (Reply(429, b"slow down", {"Retry-After": "nan"}), "HTTP 429 (3 tries): slow down"),
        (Reply(500, b"a bug"), "HTTP 500: a bug"),
        (Reply(503, headers={"Retry-After": "3600"}), "HTTP 503 (3 tries)"),
        (
            Reply(302, headers={"Location": "http://127.0.0.1:9/login"}),
            "redirects to http://127.0.0.1:9/login; give the final URL",
        ),
        (Reply(body=b"<html>hello</html>"), "the answer is not JSON"),
        (Reply(body=b"[" * 100_000), "the answer is not JSON"),
        (Reply(body=b'{"choices": []}'), "the answer has no choices (found ['choices'])"),
        (Reply(body=b'{"error": "no such model"}'), "the answer has no choices (found 'no such model')"),
        (Reply(body=b" " * 999, how="cut"), "the connection broke (3 tries): IncompleteRead(499 bytes read, 500 more expected)"),
        (Reply(how="drop"), "the connection broke (3 tries): Remote end closed connection"),
    ],
    ids=lambda value: f"{value.status}-{value.how}" if isinstance(value, Reply) else "",
)
@pytest.mark.parametrize("named", [False, True], ids=["list", "prompt"])
def test_a_broken_endpoint_could_not_be_compared(named: bool, reply: Reply, message: str, run: Run, endpoint: Endpoint) -> None:
    endpoint.always = reply
    if not named and b"choices" in reply.body + message.encode():
        message = "found 0 models (none), expected one; give one with --name"
    assert run.text(*(["--name", "tiny"] if named else []), code=2) == ""
    assert run.err.startswith("v4 compare: ") and message in run.err, run.err


@pytest.mark.parametrize("how", ["silent", "trickle"])
def test_an_endpoint_that_hangs_is_given_up(how: str, run: Run, endpoint: Endpoint) -> None:
    endpoint.always = Reply(body=b" " * 100_000, how=how, seconds=20)
    begin = time.monotonic()
    run.text("--timeout", "0.2", "--retries", "1", code=2)
    assert time.monotonic() - begin < 10
    assert "no complete answer within 0.2 s (2 tries); raise --timeout" in run.err


@pytest.mark.parametrize(
    "fault",
    [Reply(429, headers={"Retry-After": "0"}), Reply(502), Reply(500), Reply(how="drop"), Reply(body=b" " * 99, how="cut")],
    ids=lambda reply: f"{reply.status}-{reply.how}",
)
def test_a_passing_fault_is_tried_again(fault: Reply, run: Run, endpoint: Endpoint) -> None:
    # the list of models, the probe and p0 are answered, p2 at the third try
    endpoint.script = [None, None, None, fault, fault]
    assert run.json(code=0)["summary"]["compared"] == sum(LENGTHS) - 3
    assert len(endpoint.requests) == 6
    endpoint.script = [None, None, None, fault]
    run.text("--retries", "0", code=2)
    assert "prompt p2 (2 of 3 done)" in run.err


def test_a_closed_port_is_could_not_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    out.write_text("before")
    run.command[4] = f"http://127.0.0.1:{closed_port()}/v1"
    assert run.text("--out", str(out), "--overwrite", code=2) == ""
    assert f"{run.command[4]}/models: not reachable (3 tries): [Errno 111] Connection refused; is the server up?" in run.err
    assert out.read_text() == "before"


def test_no_proxy_stands_between_this_machine_and_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    run.text(code=0)


def test_which_model_is_asked(run: Run, endpoint: Endpoint) -> None:
    endpoint.models = ["one", "two"]
    run.text(code=2)
    assert "found 2 models (one, two), expected one; give one with --name" in run.err
    assert run.json("--name", "two", code=0)["name"] == "two"
    run.text("--name", "three", code=2)
    assert "found 2 models (one, two), expected 'three' among them" in run.err
    # no list, or none that everyone may see
    for reply in (Reply(404), Reply(403), Reply(body=b"<html>")):
        endpoint.models, endpoint.script = ["three"], [reply]
        assert run.json("--name", "three", code=0)["name"] == "three"
    endpoint.script, endpoint.accepts = [Reply(404)], {"echo"}
    run.text("--name", "four", code=2)
    assert "found no way" in run.err and "HTTP 404" in run.err and "The model four does not exist" in run.err


def test_an_endpoint_without_log_probabilities_is_refused(run: Run, endpoint: Endpoint) -> None:
    endpoint.always = Reply(body=json.dumps({"choices": [{"text": "hello", "logprobs": None}]}).encode())
    run.text("--name", "tiny", "--stride", "4", code=2)
    tried = [line.strip().split(":")[0] for line in run.err.splitlines() if line.startswith("  ")]
    fields = " and vLLM fields"
    assert tried == [
        f"echo with token ids{fields}",
        "echo with token ids",
        f"prompt-logprobs with token ids{fields}",
        "generate with token ids",
        f"steps with token ids{fields}",
        "steps with token ids",
    ]
    assert "the answer has no choices[0].logprobs" in run.err and "the answer has no meta_info" in run.err
    endpoint.reset()
    endpoint.ignores_echo = True
    endpoint.accepts = {"steps"}
    run.text(code=2)
    assert "found 1 tokens, expected the 9 of the prompt" in run.err


def test_the_key_is_sent_and_never_shown(run: Run, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, out = "sk-very-secret", tmp_path / "report.json"
    endpoint.key = key
    options = ["--api-key-env", "V4_TEST_KEY", "--out", str(out), "--overwrite"]
    run.text(*options, code=2)
    assert "the environment variable V4_TEST_KEY is not set" in run.err and not endpoint.requests
    monkeypatch.setenv("V4_TEST_KEY", key)
    said = run.text(*options, code=0) + run.err + out.read_text()
    assert {headers["Authorization"] for _, _, headers in endpoint.requests} == {f"Bearer {key}"}
    quoting = [f"no: {key}".encode(), f'{{"error": "{key}"}}'.encode(), b'{"choices": [' + b" " * 285 + key.encode()]
    for body in quoting:
        for status in (200, 401, 404):
            endpoint.always = Reply(status, body)
            said += run.text("--name", "tiny", *options, code=2) + run.err
            assert "**" in run.err
    assert "sk-" not in said
