"""The formats in which servers return log-probabilities of a prompt, read into one: an entry per token.

OpenAI completions with echo (vLLM, SGLang), vLLM's prompt_logprobs, SGLang's /generate, one generated token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from v4.tokenizer import Tokenizer

Key = int | str
"""A token: its id, or its text where the server gives no ids."""

_ID = "token_id:"
_BYTES = "bytes:"
# rounding of a probability close to one may leave a tiny positive value; anything above is no log-probability
_ABOVE_ZERO = 1e-2


class Unsuitable(ValueError):
    """The endpoint answered, but not with log-probabilities of the prompt. The message says what was found."""


@dataclass(frozen=True)
class Entry:
    """What an endpoint says about one token: which it is (None: not told), its log-probability, and those of others there."""

    token: Key | None = None
    logprob: float | None = None
    top: Mapping[Key, float] = field(default_factory=dict)


class Names:
    """Ids of token texts, and whether a server's token is ours. Without a tokenizer only ids are understood.

    vocabulary: ids that the model has, from 0.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ids: dict[bytes, int | None] | None = None

    def text(self, token: int) -> str:
        """Text of one token; bytes that are no UTF-8 on their own become U+FFFD. The id itself where no tokenizer knows it."""
        if self._tokenizer is None or not 0 <= token < self._tokenizer.vocab_size:
            return f"{token}"
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def same(self, found: Key | None, token: int) -> bool:
        """Whether the server's token may be `token`. A piece of a character has no text of its own: any text passes for it."""
        if found is None or self._tokenizer is None:
            return found is None or isinstance(found, str) or found == token
        if isinstance(found, int) or token >= self._tokenizer.vocab_size:
            return found == token or isinstance(found, str)
        own = self._tokenizer.token_bytes(token)
        if found.startswith(_BYTES):
            return _unescaped(found) == own
        try:
            whole = own.decode("utf-8")
        except UnicodeDecodeError:
            return True
        return found == whole or (found == "" and self._tokenizer.is_special(token))

    def resolve(self, key: Key) -> int | None:
        """The id of a token; None where its text does not belong to exactly one token, or the model has no such id."""
        if isinstance(key, int):
            return key if 0 <= key < self._vocabulary else None
        if self._tokenizer is None:
            return None
        if self._ids is None:
            self._ids = {}
            for token in range(min(self._tokenizer.vocab_size, self._vocabulary)):
                try:
                    data = self._tokenizer.token_bytes(token)
                except ValueError:
                    # a vocabulary may have holes
                    continue
                self._ids[data] = None if data in self._ids else token
        data = _unescaped(key) if key.startswith(_BYTES) else key.encode("utf-8", "surrogatepass")
        return self._ids.get(data)


def _unescaped(text: str) -> bytes:
    # OpenAI's form of a token that is no text: bytes:\xe4\xbd
    try:
        return text.removeprefix(_BYTES).encode("ascii").decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return text.encode("utf-8", "surrogatepass")


def _key(text: object) -> Key | None:
    if not isinstance(text, str):
        return None
    if text.startswith(_ID) and text[len(_ID) :].isdigit():
        return int(text[len(_ID) :])
    return text


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unsuitable(f"{where} is {value!r}, expected a number or null")
    if value > _ABOVE_ZERO:
        raise Unsuitable(f"{where} is {value}, expected a log-probability (at most 0)")
    return -math.inf if value == -math.inf else float(value)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unsuitable(f"{where} is {'null or absent' if value is None else type(value).__name__}, expected a list")
    return value


def _choice(body: object) -> Mapping[str, Any]:
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        found = sorted(body) if isinstance(body, Mapping) else type(body).__name__
        raise Unsuitable(f"the answer has no choices (found {found})")
    return choices[0]


def _top(value: object, where: str) -> dict[Key, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Unsuitable(f"{where} is a {type(value).__name__}, expected an object of token and log-probability")
    pairs = ((_key(text), _number(number, where)) for text, number in value.items())
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
    return [
        Entry(
            ids[i] if i < len(ids) and isinstance(ids[i], int) else _key(tokens[i]),
            _number(values[i], f"token_logprobs[{i}]"),
            _top(tops[i], f"top_logprobs[{i}]"),
        )
        for i in range(len(values))
    ]


def _content(row: object, i: int) -> Entry:
    if not isinstance(row, Mapping):
        raise Unsuitable(f"logprobs.content[{i}] is a {type(row).__name__}, expected an object")

    def key(of: Mapping[str, Any]) -> Key | None:
        return of["id"] if isinstance(of.get("id"), int) else _key(of.get("token"))

    others = [other for other in row.get("top_logprobs") or [] if isinstance(other, Mapping)]
    pairs = ((key(other), _number(other.get("logprob"), f"content[{i}].top_logprobs")) for other in others)
    top = {name: number for name, number in pairs if name is not None and number is not None}
    return Entry(key(row), _number(row.get("logprob"), f"content[{i}].logprob"), top)


def prompt_logprobs(body: object, ids: Sequence[int]) -> list[Entry]:
    """Entries of vLLM's `prompt_logprobs`: per token null or {id: {logprob, rank, decoded_token}}. Unsuitable when absent.

    The rows do not say which of their tokens is the prompt's: `ids` do, where the row has them.
    """
    choice = _choice(body)
    found = choice.get("prompt_logprobs")
    if found is None and isinstance(body, Mapping):
        found = body.get("prompt_logprobs")
    rows = _list(found, "prompt_logprobs")
    told = choice.get("prompt_token_ids")
    entries: list[Entry] = []
    for i, row in enumerate(rows):
        where = f"prompt_logprobs[{i}]"
        token = told[i] if isinstance(told, list) and i < len(told) and isinstance(told[i], int) else None
        if row is None:
            entries.append(Entry(token))
            continue
        if not isinstance(row, Mapping):
            raise Unsuitable(f"{where} is a {type(row).__name__}, expected an object of token id and log-probability")
        top: dict[Key, float] = {}
        for name, value in row.items():
            number = _number(value.get("logprob") if isinstance(value, Mapping) else value, where)
            if name.isdigit() and number is not None:
                top[int(name)] = number
        if token is None and i < len(ids):
            # a row always holds the prompt's own token: without ours, the server read another one
            token = ids[i] if ids[i] in top else next(iter(top), -1)
        entries.append(Entry(token, None if token is None else top.get(token), top))
    return entries


def native(body: object) -> list[Entry]:
    """Entries of SGLang's /generate: meta_info.input_token_logprobs of (log-probability, id, text). Unsuitable when absent."""
    meta = body.get("meta_info") if isinstance(body, Mapping) else None
    if not isinstance(meta, Mapping):
        raise Unsuitable("the answer has no meta_info")
    rows = _list(meta.get("input_token_logprobs"), "meta_info.input_token_logprobs")
    tops = meta.get("input_top_logprobs") or [None] * len(rows)

    def triple(row: object, where: str) -> tuple[float | None, int]:
        if not isinstance(row, list) or len(row) < 2 or not isinstance(row[1], int):
            raise Unsuitable(f"{where} is {row!r}, expected [log-probability, id, text]")
        return _number(row[0], where), row[1]

    entries = []
    for i, row in enumerate(rows):
        value, token = triple(row, f"input_token_logprobs[{i}]")
        others = [triple(other, f"input_top_logprobs[{i}]") for other in (tops[i] if i < len(tops) else None) or []]
        entries.append(Entry(token, value, {other: number for number, other in others if number is not None}))
    return entries
