"""The formats in which servers return log-probabilities of a prompt, read into one: an entry per token.

OpenAI completions with echo (vLLM, SGLang), vLLM's prompt_logprobs, SGLang's /generate, one generated token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from tools.compare.names import REPLACEMENT, Key, Names, from_vocabulary, named

_ID = "token_id:"
# rounding of a probability close to one may leave a tiny positive value; anything above is no log-probability
_ABOVE_ZERO = 1e-2
# JSON has no infinity: servers write this number instead
_MINUS_INFINITY = -9999.0
_EXCERPT = 200


class Unsuitable(ValueError):
    """The endpoint answered, but not with log-probabilities of the prompt. The message says what was found."""


@dataclass(frozen=True)
class Entry:
    """What an endpoint says about one token: which it is (None: not told), its log-probability, and those of others there."""

    token: Key | None = None
    logprob: float | None = None
    top: Mapping[Key, float] = field(default_factory=dict)


def as_text(entries: Sequence[Entry], ids: Sequence[int], names: Names) -> list[Entry]:
    """The entries with tokens named by their text, where the server names those of `ids` as its vocabulary does."""
    if not any(names.as_in_vocabulary(entry.token, token) for entry, token in zip(entries, ids, strict=False)):
        return list(entries)
    return [
        replace(
            entry,
            token=None if entry.token is None else from_vocabulary(entry.token),
            top={from_vocabulary(name): number for name, number in entry.top.items()},
        )
        for entry in entries
    ]


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _key(token: object) -> Key | None:
    if not isinstance(token, str):
        return token if _is_id(token) else None
    number = token.removeprefix(_ID)
    return int(number) if number != token and _is_decimal(number) else token


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unsuitable(f"{where} is {_brief(value)}, expected a number or null")
    if value > _ABOVE_ZERO:
        raise Unsuitable(f"{where} is {_brief(value)}, expected a log-probability (at most 0)")
    return -math.inf if value <= _MINUS_INFINITY else float(value)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unsuitable(f"{where} is {'null or absent' if value is None else type(value).__name__}, expected a list")
    return value


def _choice(body: object) -> Mapping[str, Any]:
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        # some servers send their errors with status 200
        told = (body.get("error") or body.get("message")) if isinstance(body, Mapping) else None
        found = _brief(told or sorted(body)) if isinstance(body, Mapping) else type(body).__name__
        raise Unsuitable(f"the answer has no choices (found {found})")
    return choices[0]


def _top(value: object, where: str, *, numbered: bool = False) -> dict[Key, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Unsuitable(f"{where} is a {type(value).__name__}, expected an object of token and log-probability")
    pairs = (
        (_key(int(text) if numbered and _is_decimal(text) else text), _number(number, where)) for text, number in value.items()
    )
    return {key: number for key, number in pairs if key is not None and number is not None}


def completion(body: object) -> list[Entry]:
    """Entries of `choices[0].logprobs`, in the completions' form or the chat's (`content`). Unsuitable when there are none."""
    choice = _choice(body)
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        raise Unsuitable("the answer has no choices[0].logprobs")
    if isinstance(logprobs.get("content"), list):
        return [_content(row, i) for i, row in enumerate(logprobs["content"])]
    values = _list(logprobs.get("token_logprobs"), "logprobs.token_logprobs")
    tokens, tops = logprobs.get("tokens") or [None] * len(values), logprobs.get("top_logprobs") or [None] * len(values)
    for name, column in (("tokens", tokens), ("top_logprobs", tops)):
        if not isinstance(column, list) or len(column) != len(values):
            size = len(column) if isinstance(column, list) else type(column).__name__
            raise Unsuitable(f"logprobs.{name} has {size} entries, expected {len(values)} as in token_logprobs")
    told = choice.get("prompt_token_ids")
    ids = told if isinstance(told, list) else []
    # names of an object are texts in JSON, also where the server's tokens are numbers
    numbered = any(map(_is_id, tokens))
    return [
        Entry(
            ids[i] if i < len(ids) and _is_id(ids[i]) else _key(tokens[i]),
            _number(values[i], f"token_logprobs[{i}]"),
            _top(tops[i], f"top_logprobs[{i}]", numbered=numbered),
        )
        for i in range(len(values))
    ]


def _content(row: object, i: int) -> Entry:
    if not isinstance(row, Mapping):
        raise Unsuitable(f"logprobs.content[{i}] is a {type(row).__name__}, expected an object")

    def key(of: Mapping[str, Any]) -> Key | None:
        name = of["id"] if _is_id(of.get("id")) else _key(of.get("token"))
        data = of.get("bytes")
        # the text of a piece of a character is lost, its bytes are not
        return named(bytes(data)) if isinstance(name, str) and REPLACEMENT in name and _is_bytes(data) else name

    rows = _list(row.get("top_logprobs") or [], f"content[{i}].top_logprobs")
    others = [other for other in rows if isinstance(other, Mapping)]
    pairs = ((key(other), _number(other.get("logprob"), f"content[{i}].top_logprobs")) for other in others)
    top = {name: number for name, number in pairs if name is not None and number is not None}
    return Entry(key(row), _number(row.get("logprob"), f"content[{i}].logprob"), top)


def _is_bytes(data: object) -> TypeGuard[list[int]]:
    return isinstance(data, list) and bool(data) and all(_is_id(byte) and 0 <= byte < 256 for byte in data)


def prompt_logprobs(body: object, ids: Sequence[int]) -> list[Entry]:
    """Entries of vLLM's `prompt_logprobs`: per token null or {id: {logprob, rank, decoded_token}}. Unsuitable when absent.

    The rows do not say which of their tokens is the prompt's: it is the one of `ids` where there are as many rows and the row has it,
    else the row's first.
    """
    choice = _choice(body)
    found = choice.get("prompt_logprobs")
    if found is None and isinstance(body, Mapping):
        found = body.get("prompt_logprobs")
    rows = _list(found, "prompt_logprobs")
    told = choice.get("prompt_token_ids")
    ours = ids if len(rows) == len(ids) else ()
    entries: list[Entry] = []
    for i, row in enumerate(rows):
        where = f"prompt_logprobs[{i}]"
        token = told[i] if isinstance(told, list) and i < len(told) and _is_id(told[i]) else None
        if row is None or row == {}:
            entries.append(Entry(token))
            continue
        if not isinstance(row, Mapping):
            raise Unsuitable(f"{where} is a {type(row).__name__}, expected an object of token id and log-probability")
        numbers = {
            int(name): _number(value.get("logprob") if isinstance(value, Mapping) else value, where)
            for name, value in row.items()
            if _is_decimal(name)
        }
        if not numbers:
            raise Unsuitable(f"{where} has the tokens {_brief(list(row))}, expected ids")
        if token is None:
            # a row always holds the prompt's own token: without ours, the server read another one
            token = ids[i] if i < len(ours) and ids[i] in numbers else next(iter(numbers))
        entries.append(Entry(token, numbers.get(token), {name: number for name, number in numbers.items() if number is not None}))
    return entries


def native(body: object) -> list[Entry]:
    """Entries of SGLang's /generate: meta_info.input_token_logprobs of (log-probability, id, text). Unsuitable when absent."""
    meta = body.get("meta_info") if isinstance(body, Mapping) else None
    if not isinstance(meta, Mapping):
        raise Unsuitable("the answer has no meta_info")
    rows = _list(meta.get("input_token_logprobs"), "meta_info.input_token_logprobs")
    tops = _list(meta.get("input_top_logprobs") or [], "meta_info.input_top_logprobs")

    def triple(row: object, where: str) -> tuple[float | None, int]:
        if not isinstance(row, list) or len(row) < 2 or not _is_id(row[1]):
            raise Unsuitable(f"{where} is {_brief(row)}, expected [log-probability, id, text]")
        return _number(row[0], where), row[1]

    entries = []
    for i, row in enumerate(rows):
        value, token = triple(row, f"input_token_logprobs[{i}]")
        here = _list((tops[i] if i < len(tops) else None) or [], f"input_top_logprobs[{i}]")
        others = [triple(other, f"input_top_logprobs[{i}]") for other in here]
        entries.append(Entry(token, value, {other: number for number, other in others if number is not None}))
    return entries
