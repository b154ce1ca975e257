"""Wrong conversations are refused with the message, what was found, and what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from v4.encoding import encode
from v4.prompt_texts import identify, own_texts_file, read_constants

OWN = identify(read_constants(own_texts_file().decode(), "own"), "own")
ADD = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {"type": "object"}}}


def user(text: Any = "U", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def system(text: Any = "S", **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def developer(text: Any = "D", **more: Any) -> dict[str, Any]:
    return {"role": "developer", "content": text, **more}


def assistant(text: Any = "C", reasoning: Any = "R", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


def call(name: str = "add", arguments: str = "{}", id_: str = "c1") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any = "5", id_: Any = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


ASKED = [user(), assistant(tool_calls=[call()])]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: found of type list, expected a list with at least one message"),
        ("hello", "messages: found of type str, expected a list"),
        (["hello"], "messages\\[0\\]: found of type str, expected an object with role and content"),
        (
            [{"role": "function", "content": "x"}],
            "messages\\[0\\]: found role 'function', expected one of system, developer, user",
        ),
        ([{"content": "x"}], "found role None"),
        ([developer("")], "messages\\[0\\] \\(developer\\): found no text, expected some"),
        ([developer(None)], "found content null, expected a text"),
        ([user(None)], "found content null, expected a text or a list"),
        ([user(5)], "found content of type int"),
        ([user([{"type": "image_url"}])], "found a part of type 'image_url' as content\\[0\\].*the model reads text only"),
        ([user(["x"])], "found of type str as content\\[0\\]"),
        ([user([{"type": "text", "text": 1}])], "found content\\[0\\].text of type int"),
        ([system(["x"])], "found content of type list, expected a text"),
        ([user(task="summary")], "found task 'summary', expected one of action, query, authority, domain, title, read_url"),
        ([*ASKED, {**result(), "task": "title"}], "expected none on a tool message"),
        ([system(tools={"a": 1})], "found tools of type dict, expected a list of OpenAI function objects"),
        ([system(tools=[ADD["function"]])], "tools\\[0\\]: found a value of type dict without a function that has a name"),
        ([system(tools=[{"function": {"name": "f", "x": {1}}}])], "tools\\[0\\]: found a value that JSON cannot hold"),
        ([system(response_format={1j})], "response_format: found a value that JSON cannot hold"),
        ([user(), assistant(tool_calls={})], "found tool_calls of type dict"),
        ([user(), assistant(tool_calls=[{"name": "f"}])], "tool_calls\\[0\\]: found a value of type dict without a function"),
        (
            [user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
            "found arguments of type dict, .*json.dumps",
        ),
        (
            [user(), assistant(tool_calls=[call(arguments="[1]")])],
            "found arguments of type list, expected the JSON text of an object",
        ),
        ([user(), assistant(reasoning=["R"])], "found reasoning_content of type list"),
        ([user(), assistant(reasoning="a") | {"reasoning": "b"}], "different texts under reasoning_content and reasoning"),
        (
            [user(), result()],
            "messages\\[1\\] \\(tool\\): found a tool result, expected tool_calls on the assistant message before it",
        ),
        ([*ASKED, assistant(), result()], "messages\\[3\\] \\(tool\\): found a tool result, expected tool_calls"),
        ([*ASKED, result(id_="c2")], "found tool_call_id 'c2', expected the id of a call .* \\('c1'\\)"),
        ([*ASKED, {"role": "tool", "content": "5"}], "found tool_call_id '', expected the id"),
        ([*ASKED, result(id_=7)], "found tool_call_id of type int"),
        ([*ASKED, result(None)], "found content null"),
    ],
)
def test_wrong_conversations(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(messages, texts=OWN)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode: found 'think', expected 'chat' or 'thinking'"):
        encode([user()], mode="think")


def test_texts_that_a_checkpoint_lacks() -> None:
    with pytest.raises(
        ValueError, match="needs the tools section, and the checkpoint has none .* copy that file from the release"
    ):
        encode([system(tools=[ADD]), user()])
    with pytest.raises(ValueError, match="needs the response-format section"):
        encode([system(response_format={"type": "object"}), user()])
