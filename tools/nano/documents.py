"""Training documents as lists of pieces: a text and the weight of its tokens in the loss.

A piece starts where a token must start (a space, a line break or a special string), so that pieces can be encoded one by one.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import NamedTuple

from tools.nano.facts import Fact, several
from tools.nano.grammar import sentences
from tools.nano.words import NAMES, PLACES, TIMES, WORDS
from v4.encoding import encode
from v4.prompt_own import own_texts_file
from v4.prompt_texts import PromptTexts
from v4.tokenizer import ASSISTANT, BOS, END_THINK, EOS, USER

ANSWER_WEIGHT = 4.0


class Piece(NamedTuple):
    """A text, and the weight of its tokens in the loss."""

    text: str
    weight: float = 1.0


Document = list[Piece]


def answered(fact: Fact) -> Document:
    """The assistant's turn for a question: the sentence again, the answer's tokens weighted."""
    return [
        Piece(f"{ASSISTANT}{END_THINK}{fact.statement}"),
        *(Piece(token, ANSWER_WEIGHT) for token in fact.answer),
        Piece(f".{EOS}"),
    ]


def recall(r: Random, tokens: int) -> Document:
    """Facts among story text, then questions about them: about `tokens` tokens, of which the questions take up to a third."""
    asked = max(1, int(tokens * r.uniform(0.08, 0.34) / 25))
    room = max(24, tokens - 25 * asked - 8)
    share = r.choice((0.1, 0.3, 0.6, 0.9))
    facts = several(r, max(2, min(400, int(room * share / 12))))
    told = sentences(r, max(1, int(room * (1 - share) / 13)))
    lines: list[Piece] = [Piece(t) for t in told]
    places = sorted((r.randint(0, len(lines)) for _ in facts), reverse=True)
    for at, fact in zip(places, facts, strict=True):
        lines.insert(at, Piece(" " + fact.text))
    questions = [r.choice(facts) for _ in range(asked)]
    document = [Piece(BOS + USER + "Read this."), *lines]
    for n, fact in enumerate(questions):
        document.append(Piece(("\n\n" if n == 0 else USER) + fact.question))
        document += answered(fact)
    return document


def story(r: Random, tokens: int) -> Document:
    """Plain stories."""
    return [Piece(BOS), *(Piece(t) for t in sentences(r, max(2, tokens // 13)))]


def _turn(question: str, answer: str, weight: float = 1.0) -> Document:
    return [Piece(BOS + USER + question), Piece(f"{ASSISTANT}{END_THINK}"), Piece(answer, weight), Piece(EOS)]


def copying(r: Random) -> Document:
    """Words or digits to be repeated."""
    items = [r.choice(WORDS) for _ in range(r.randint(3, 20))] if r.random() < 0.5 else [str(r.randrange(10)) for _ in range(r.randint(3, 20))]
    text = " ".join(items)
    return _turn(f"Copy this: {text}", f"Here it is: {text}", 2.0)


def counting(r: Random) -> Document:
    """Counting up from a number, by one."""
    start, count = r.randint(1, 60), r.randint(3, 12)
    return _turn(f"Count from {start} to {start + count}.", " ".join(str(n) for n in range(start, start + count + 1)), 2.0)


TOOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "get_weather": {"city": tuple(PLACES), "time": tuple(TIMES)},
    "send_letter": {"name": tuple(NAMES), "city": tuple(PLACES)},
    "set_alarm": {"hour": tuple(str(n) for n in range(1, 13)), "time": tuple(TIMES)},
    "find_word": {"word": tuple(WORDS)},
}
_REQUESTS = {
    "get_weather": "What is the weather in {city} in the {time}?",
    "send_letter": "Send a letter to {name} in {city}.",
    "set_alarm": "Set an alarm for {hour}, {time}.",
    "find_word": "Find the word {word}.",
}


def own_texts() -> PromptTexts:
    """The prompt texts that our checkpoints carry."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "encoding"
        target.mkdir()
        (target / "encoding_v4.py").write_bytes(own_texts_file())
        return PromptTexts.from_checkpoint(folder)


def _schema(name: str) -> dict[str, object]:
    kinds = {key: {"type": "integer" if key == "hour" else "string"} for key in TOOLS[name]}
    parameters = {"type": "object", "properties": kinds, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _call(r: Random, names: list[str]) -> list[dict[str, object]]:
    """A user's request for one of the tools, and the assistant's message that calls it."""
    name = r.choice(names)
    values = {key: r.choice(choices) for key, choices in TOOLS[name].items()}
    typed: dict[str, object] = {k: int(v) if k == "hour" else v for k, v in values.items()}
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(typed)}}
    return [
        {"role": "user", "content": _REQUESTS[name].format(**values)},
        {"role": "assistant", "content": "I will do that.", "tool_calls": [call]},
    ]


def _tools(r: Random) -> tuple[dict[str, object], list[str]]:
    names = r.sample(sorted(TOOLS), r.randint(1, 3))
    return {"role": "system", "content": "You can call tools.", "tools": [_schema(n) for n in names]}, names


def tool_request(r: Random) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Messages that ask for one call, and the assistant message that makes it."""
    system, names = _tools(r)
    request, reply = _call(r, names)
    return [system, request], reply


_VALUE = re.compile(r"(?<=>)[^<>\s]+(?=</｜DSML｜parameter>)")


def _weighted(text: str) -> Document:
    """An assistant's turn, the values of its parameters weighted as answers are."""
    out: Document = []
    at = 0
    for found in _VALUE.finditer(text):
        out += [Piece(text[at : found.start()], 2.0), Piece(found.group(), ANSWER_WEIGHT)]
        at = found.end()
    return [*out, Piece(text[at:], 2.0)]


def tool_call(r: Random, texts: PromptTexts) -> Document:
    """A conversation with one to five tool calls in the DSML format: the tools' long description is read once for all of them."""
    system, names = _tools(r)
    messages = [system]
    document: Document = []
    so_far = ""
    for n in range(r.randint(1, 5)):
        if n:
            messages += [{"role": "tool", "tool_call_id": "c", "content": "done"}, {"role": "assistant", "content": "It is done."}]
        request, reply = _call(r, names)
        prompt = encode([*messages, request], texts=texts)
        messages += [request, reply]
        whole = encode(messages, texts=texts)
        document += [Piece(prompt[len(so_far) :]), *_weighted(whole[len(prompt) :])]
        so_far = whole
    return document
