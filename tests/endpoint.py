"""An OpenAI-compatible endpoint on 127.0.0.1 that answers from one of our models, in every form that v4 compare reads.

It answers as vLLM, SGLang and servers that only generate do, by `accepts`, `takes` and `naming`. Faults: `tamper` changes what is
said about the tokens, `script`, `always` and, before /generate, `guard` replace whole answers. Nothing but the loopback address is ever bound or asked.
"""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import v4
from tests import tiny
from tools.cli import main
from v4.tokenizer import BOS, Tokenizer

LENGTHS = (12, 9, 14)
"""Tokens of the prompts of `prompt_file`."""

_LETTERS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = {**{b: chr(b) for b in _LETTERS}, **{b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*_LETTERS}))}}


@dataclass
class Row:
    """What the endpoint says about one token: its log-probability, and the likeliest there with theirs, best first."""

    token: int
    logprob: float | None
    top: list[tuple[int, float | None]]


@dataclass
class Reply:
    """A whole answer. how: "whole"; "cut": the connection closes within the body; "drop": before any answer; "silent": no answer
    until `seconds` have passed; "trickle": a byte now and then for `seconds`."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    how: str = "whole"
    seconds: float = 3.0


def _serialised(status: int, body: object) -> Reply:
    return Reply(status, json.dumps(body).encode())


def _error(status: int, message: str) -> Reply:
    return _serialised(status, {"error": {"message": message, "code": status}})


class Endpoint:
    """The server. `url` is its base; every attribute set by `reset` may be changed by a test."""

    def __init__(self, model: v4.LoadedModel, tokenizer: Tokenizer | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                endpoint._serve(self, None)

            def do_POST(self) -> None:
                endpoint._serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args: Any) -> None:
                """Silent: pytest shows what matters."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.released = threading.Event()
        self.reset()

    def reset(self) -> None:
        """A sound endpoint that knows every way, as token ids and as text."""
        self.models = ["tiny"]
        self.accepts = {"echo", "prompt-logprobs", "generate", "steps"}
        self.takes = {"ids", "text"}
        self.naming = "text"
        self.strict = self.chat_form = self.adds_bos = self.ignores_echo = False
        self.tokenise: Callable[[str], list[int]] | None = None
        self.key: str | None = None
        self.tamper: Callable[[list[Row]], list[Row]] = lambda rows: rows
        self.watch: Callable[[], None] = lambda: None
        self.script: list[Reply | None] = []
        self.always: Reply | None = None
        self.guard: Reply | None = None
        self.generated = -1
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.released.clear()

    @property
    def url(self) -> str:
        """Base URL, ending in /v1."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        """Stop the server and wait until it has stopped."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    # ---- what is answered ----------------------------------------------------------------------------------------------------

    def _serve(self, handler: http.server.BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        self.requests.append((handler.path, body or {}, dict(handler.headers)))
        scripted = self.script.pop(0) if self.script else None
        given = handler.headers.get("Authorization")
        if reply := scripted or self.always:
            self._send(handler, reply)
        elif self.key is not None and given != f"Bearer {self.key}":
            self._send(handler, _error(401, f"wrong key in {given!r}"))
        elif self.guard and handler.path == "/generate":
            self._send(handler, self.guard)
        elif body is None:
            known = handler.path == "/v1/models"
            data = [{"id": name, "object": "model"} for name in self.models]
            self._send(handler, _serialised(200, {"data": data}) if known else _error(404, "no such path"))
        else:
            self.watch()
            self._send(handler, self._answer(handler.path, body))

    def _send(self, handler: http.server.BaseHTTPRequestHandler, reply: Reply) -> None:
        handler.close_connection = True
        if reply.how == "silent":
            self.released.wait(reply.seconds)
        if reply.how in ("silent", "drop"):
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", f"{len(reply.body)}")
        handler.end_headers()
        if reply.how == "trickle":
            end = time.monotonic() + reply.seconds
            try:
                while time.monotonic() < end:
                    handler.wfile.write(b" ")
                    time.sleep(0.02)
            except OSError:
                # the client has had enough
                return
        handler.wfile.write(reply.body[: len(reply.body) // 2] if reply.how == "cut" else reply.body)

    def _answer(self, path: str, body: dict[str, Any]) -> Reply:
        native = path == "/generate"
        if not native and body["model"] not in self.models:
            return _error(404, f"The model {body['model']} does not exist")
        if self.strict and (extra := {"return_tokens_as_token_ids", "add_special_tokens"} & set(body)):
            return _error(400, f"unknown field {min(extra)}")
        sent = (body.get("input_ids") or body.get("text")) if native else body["prompt"]
        if ("text" if isinstance(sent, str) else "ids") not in self.takes:
            return _error(400, f"prompt is a {type(sent).__name__}")
        ids = self._read(sent, body) if isinstance(sent, str) else list(sent)
        kind = (
            "echo" if body.get("echo") else "prompt-logprobs" if "prompt_logprobs" in body else "generate" if native else "steps"
        )
        if self.ignores_echo and kind in ("echo", "prompt-logprobs"):
            kind = "steps"
        if kind not in self.accepts:
            return _error(404 if native else 400, f"{kind} is not supported")
        count = body.get("logprobs") or body.get("prompt_logprobs") or body.get("top_logprobs_num") or 0
        rows = self.tamper(self._rows(ids, count))
        if kind == "generate":
            return _serialised(200, self._native(rows[:-1]))
        if kind == "prompt-logprobs":
            return _serialised(
                200, {"choices": [{"text": "", "prompt_logprobs": [self._vllm(row, i) for i, row in enumerate(rows[:-1])]}]}
            )
        logprobs = self._logprobs(rows[-1:] if kind == "steps" else rows, bool(body.get("return_tokens_as_token_ids")))
        return _serialised(200, {"choices": [{"text": "", "logprobs": logprobs if body.get("logprobs") else None}]})

    def _read(self, text: str, body: dict[str, Any]) -> list[int]:
        assert self.tokenizer is not None
        ids = self.tokenise(text) if self.tokenise else self.tokenizer.encode(text)
        return [*self.tokenizer.encode(BOS), *ids] if self.adds_bos and body.get("add_special_tokens", "prompt" in body) else ids

    def _rows(self, ids: Sequence[int], count: int) -> list[Row]:
        """Of every token and of one generated after them."""
        logprobs_TV = torch.log_softmax(self.model.logits(list(ids)).float(), dim=-1)
        top = logprobs_TV.topk(max(count, 1), dim=-1)
        rows = [Row(ids[0], None, [])]
        self.generated = int(top.indices[-1, 0])
        for i, token in enumerate([*ids[1:], self.generated]):
            likeliest = list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True))
            rows.append(Row(token, float(logprobs_TV[i, token]), likeliest))
        return rows

    # ---- in which form ---------------------------------------------------------------------------------------------------------

    def _name(self, token: int, as_id: bool) -> Any:
        if as_id or self.tokenizer is None or self.naming == "number":
            return token if self.naming == "number" else f"token_id:{token}"
        data = self.tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        if self.naming == "bytes" and "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return "".join(_ALPHABET[byte] for byte in data) if self.naming == "vocabulary" else text

    def _logprobs(self, rows: Sequence[Row], as_ids: bool) -> dict[str, Any]:
        as_ids = as_ids and self.naming == "text" and not self.chat_form
        if self.chat_form:
            return {
                "content": [
                    {**self._content(r.token, r.logprob), "top_logprobs": [self._content(*t) for t in r.top]} for r in rows
                ]
            }
        named = [
            [self._name(row.token, as_ids) for row in rows],
            [{self._name(t, as_ids): n for t, n in row.top} for row in rows],
        ]
        tokens, tops = (None, None) if self.naming == "none" else named
        return {"tokens": tokens, "token_logprobs": [row.logprob for row in rows], "top_logprobs": tops}

    def _content(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token, False)
        data = None if self.tokenizer is None else list(self.tokenizer.token_bytes(token))
        return {"token": name, "logprob": logprob, "bytes": data}

    def _vllm(self, row: Row, i: int) -> dict[str, Any] | None:
        pairs = [(row.token, row.logprob), *(pair for pair in row.top if pair[0] != row.token)]
        return {f"{token}": {"logprob": number, "rank": 1, "decoded_token": ""} for token, number in pairs} if i else None

    def _native(self, rows: Sequence[Row]) -> dict[str, Any]:
        tops = [[[number, token, None] for token, number in row.top] or None for row in rows]
        own = [[row.logprob, row.token, None] for row in rows]
        return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops}}


class Run:
    """Runs the verb against the endpoint, without pauses between tries."""

    def __init__(self, endpoint: Endpoint, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.err = capsys, ""
        model = str(tiny.checkpoint("window-only"))
        self.command = ["compare", "--model", model, "--against", endpoint.url, "--prompts", str(prompts), "--dtype", "float32"]

    def text(self, *options: str, code: int) -> str:
        """What is printed; `code` is expected."""
        found = main([*self.command, *options])
        out, self.err = self.capsys.readouterr()
        assert found == code, out + self.err
        return out

    def json(self, *options: str, code: int) -> dict[str, Any]:
        """The JSON object; `code` is expected."""
        return json.loads(self.text("--json", *options, code=code))


@contextmanager
def serving(model: v4.LoadedModel, tokenizer: Tokenizer | None = None) -> Iterator[Endpoint]:
    """An endpoint that is stopped at the end."""
    endpoint = Endpoint(model, tokenizer)
    try:
        yield endpoint
    finally:
        endpoint.close()


def closed_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prompt_file(folder: Path) -> Path:
    """Prompts p0, p1, ... of LENGTHS token ids."""
    file = folder / "ids.jsonl"
    rows = [{"id": f"p{i}", "ids": tiny.tokens(count, seed=i)} for i, count in enumerate(LENGTHS)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


# ---- faults of `tamper` ---------------------------------------------------------------------------------------------------------


def shifted(first: int, by: float) -> Callable[[list[Row]], list[Row]]:
    """Every log-probability from token `first` on is off by a constant."""

    def change(rows: list[Row]) -> list[Row]:
        for row in rows[first:]:
            row.logprob = None if row.logprob is None else row.logprob + by
            row.top = [(token, None if number is None else number + by) for token, number in row.top]
        return rows

    return change


def at(position: int, change: Callable[[Row], None]) -> Callable[[list[Row]], list[Row]]:
    """One token is changed, where the answer reaches it."""

    def apply(rows: list[Row]) -> list[Row]:
        if position < len(rows):
            change(rows[position])
        return rows

    return apply
