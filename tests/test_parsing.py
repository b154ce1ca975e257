"""Completions back into reasoning, content and calls: strict, damaged, and streamed in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from v4.encoding import encode
from v4.parsing import Completion, Event, ParseError, StreamingParser, ToolCall, parse, parse_lenient
from v4.tokenizer import BOS, DSML, EOS

MODES = ("chat", "thinking")
CALL = f'<{DSML}invoke name="f">\n<{DSML}parameter name="k" string="true">v</{DSML}parameter>\n</{DSML}invoke>'


def block(*calls: str) -> str:
    return "\n\n" + "\n".join([f"<{DSML}tool_calls>", *calls, f"</{DSML}tool_calls>"])


def parameter(flag: str, value: str, key: str = "k") -> str:
    return f'<{DSML}parameter name="{key}" string="{flag}">{value}</{DSML}parameter>'


def invoke(*parameters: str, name: str = "f") -> str:
    return "\n".join([f'<{DSML}invoke name="{name}">', *parameters, f"</{DSML}invoke>"])


# ---------------------------------------------------------------------------------------------------------------- strict


def test_plain_completions() -> None:
    assert parse(f"C{EOS}", mode="chat") == Completion("", "C")
    assert parse(f"R</think>C{EOS}", mode="thinking") == Completion("R", "C")
    assert parse(f"</think>{EOS}", mode="thinking") == Completion()


def test_tool_calls() -> None:
    calls = [
        invoke(parameter("true", 'x "y"\n<z>'), parameter("false", "[1, 2.50]", "n")),
        invoke("", name="empty"),
        invoke(parameter("false", "nonsense", "x")),
    ]
    found = parse(f"R</think>C{block(*calls)}{EOS}", mode="thinking")
    assert (found.reasoning, found.content) == ("R", "C")
    assert found.tool_calls == (
        ToolCall("f", '{"k": "x \\"y\\"\\n<z>", "n": [1, 2.50]}'),
        ToolCall("empty", "{}"),
        ToolCall("f", '{"x": nonsense}'),
    )


def test_nothing_needs_to_follow_a_tool_block() -> None:
    assert parse(f"C{block(CALL)}", mode="chat").tool_calls == (ToolCall("f", '{"k": "v"}'),)


def test_value_ends_at_the_first_end_tag() -> None:
    found = parse(f"{block(invoke(parameter('true', f'a</{DSML}invoke> <b')))}{EOS}", mode="chat")
    assert json.loads(found.tool_calls[0].arguments) == {"k": f"a</{DSML}invoke> <b"}


@pytest.mark.parametrize(
    ("text", "mode", "position", "reason"),
    [
        ("R", "thinking", 1, "expected </think>"),
        (f"R{EOS}", "thinking", 1 + len(EOS), "expected </think>"),
        (f"R{block(CALL)}</think>{EOS}", "thinking", 1, "tool block before </think>"),
        ("C", "chat", 1, "expected <｜end▁of▁sentence｜> or a tool block"),
        (f"C{EOS}x", "chat", 1 + len(EOS), "found 'x', expected nothing after"),
        (f"C{block(CALL)}x{EOS}", "chat", 1 + len(block(CALL)), "expected nothing after"),
        (f"C</think>{EOS}", "chat", 1, "found </think> in content"),
        (f"C<think>{EOS}", "chat", 1, "found <think> in content"),
        (f"{BOS}C{EOS}", "chat", 0, f"found {BOS} in content"),
        (f"a{EOS}</think>C{EOS}", "thinking", 1, f"found {EOS} in reasoning"),
        (f"a<think></think>C{EOS}", "thinking", 1, "found <think> in reasoning"),
        (f"a\n<{DSML}tool_calls>{EOS}", "chat", 3, f"found {DSML} in content"),
        (f"{block('x' + CALL)}{EOS}", "chat", 19, "between tags"),
        (f"{block(CALL, 'x')}{EOS}", "chat", 0, "between tags"),
        (f"{block(CALL)[:-1]}{EOS}", "chat", 0, "the text ends"),
        (f"{block(invoke(parameter('true', 'v'), parameter('true', 'w')))}{EOS}", "chat", 0, "parameter 'k' twice"),
        (f"{block(invoke(parameter('maybe', 'v')))}{EOS}", "chat", 0, 'string="true|false"'),
        (f"{block(CALL.replace(' name=', 'name=', 1))}{EOS}", "chat", 0, "after <｜DSML｜invoke"),
        (f"{block(CALL.replace(f'</{DSML}par', f'/{DSML}par'))}{EOS}", "chat", 0, "after <｜DSML｜parameter"),
        (f"{block(invoke(parameter('true', 'v') + 'x'))}{EOS}", "chat", 0, "between tags"),
    ],
)
def test_violations(text: str, mode: str, position: int, reason: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(text, mode=mode)
    assert reason in caught.value.reason
    assert caught.value.position == position or (position == 0 and 0 < caught.value.position <= len(text))
    assert str(caught.value.position) in str(caught.value)


@pytest.mark.parametrize("call", [lambda: parse("", mode="think"), lambda: StreamingParser("think")])
def test_unknown_mode(call: Any) -> None:
    with pytest.raises(ValueError, match="mode: found 'think', expected 'chat' or 'thinking'"):
        call()


# ------------------------------------------------------------------------------------------------------------ round trip

words = st.lists(st.sampled_from([*'ab \n"\\{}<>/|｜é漢😀', "<｜", "｜DSM", "\n\n", "</"]), max_size=12).map("".join)
names = st.text(st.sampled_from("abc_é."), min_size=1, max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), max_size=3)


def as_message(reasoning: str, content: str, tool_calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    listed = [{"id": f"c{i}", "function": {"name": n, "arguments": json.dumps(a)}} for i, (n, a) in enumerate(tool_calls)]
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": listed}


def rendered(mode: str, message: dict[str, Any]) -> str:
    """The completion part of a prompt that ends with this assistant message."""
    user = {"role": "user", "content": "U"}
    return encode([user, message], mode=mode).removeprefix(encode([user], mode=mode))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MODES), words, words, calls)
def test_what_is_rendered_parses_back(
    mode: str, reasoning: str, content: str, tool_calls: list[tuple[str, dict[str, Any]]]
) -> None:
    text = rendered(mode, as_message(reasoning, content, tool_calls))
    found = parse(text, mode=mode)
    assert (found.reasoning, found.content) == (reasoning if mode == "thinking" else "", content)
    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == tool_calls
    assert parse_lenient(text, mode) == (found, [])


# ------------------------------------------------------------------------------------------------------------- streaming


def gathered(parser: StreamingParser, deltas: list[str]) -> tuple[Completion, list[str]]:
    """Result of the events alone, which must be what the parser reports."""
    events: list[Event] = []
    for delta in deltas:
        events += parser.feed(delta)
    events += parser.finish()
    text = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("reasoning", "content")}
    cut = {e.index for e in events if e.kind == "call_cut"}
    found = [e for e in events if e.kind == "call" and e.index not in cut]
    pieces = {e.index: "".join(p.text for p in events if p.kind == "arguments" and p.index == e.index) for e in found}
    assert [e.index for e in events if e.kind == "call_end"] == [e.index for e in found]
    completion = Completion(text["reasoning"], text["content"], tuple(ToolCall(e.text, pieces[e.index]) for e in found))
    assert completion == parser.completion
    assert [e.text for e in events if e.kind == "warning"] == parser.warnings
    return completion, parser.warnings


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


SAMPLE = (
    f"R\n\n1</think>C <\n{block(invoke(parameter('true', 'é<b'), parameter('false', '[1, {}]', 'n')), invoke('', name='g'))}{EOS}"
)


def test_every_single_split() -> None:
    whole = parse(SAMPLE, mode="thinking")
    for i in range(len(SAMPLE) + 1):
        assert gathered(StreamingParser("thinking"), [SAMPLE[:i], SAMPLE[i:]]) == (whole, []), i
    assert gathered(StreamingParser("thinking"), list(SAMPLE)) == (whole, [])


fragments = st.lists(
    st.sampled_from(
        [
            "</think>",
            "<think>",
            EOS,
            BOS,
            "\n",
            "\n\n",
            f"<{DSML}tool_calls",
            f"</{DSML}tool_calls>",
            f"<{DSML}invoke",
            f"</{DSML}invoke",
        ]
        + [f"<{DSML}parameter", f"</{DSML}parameter", f"/{DSML}parameter", ">\n", ' name="f">\n', ' name="k" string="true">']
        + [' name="n" string="false">', "1", "x", '"', "<", f"<{DSML[:3]}", block(CALL), CALL, SAMPLE]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MODES), fragments, st.lists(st.integers(0, 400), max_size=8))
@example("chat", block(CALL)[:-3], [3])
def test_any_split_of_any_text_gives_the_same(mode: str, text: str, cuts: list[int]) -> None:
    whole = parse_lenient(text, mode)
    assert gathered(StreamingParser(mode), split(text, cuts)) == whole
    assert gathered(StreamingParser(mode), list(text)) == whole
    for call in whole[0].tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
    try:
        strict = parse(text, mode=mode)
    except ParseError:
        return
    if all(_valid(call.arguments) for call in strict.tool_calls):
        assert whole[0] == strict
        assert whole[1] == ([] if text.endswith(EOS) else [f"no {EOS} at the end"])


def _valid(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_text_is_not_held_back() -> None:
    parser = StreamingParser("thinking")
    assert parser.feed("think") == [Event("reasoning", "think")]
    assert parser.feed("ing</th") == [Event("reasoning", "ing")]
    assert parser.feed("ink>a < b") == [Event("content", "a < b")]
    assert parser.feed("\n\n") == []
    assert parser.feed("c") == [Event("content", "\n\nc")]
    parser.feed(f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="k" string="true">')
    assert parser.feed('a"b') == [Event("arguments", 'a\\"b', 0)]


# --------------------------------------------------------------------------------------------------------------- damaged

WHOLE = (ToolCall("f", '{"k": "v"}'),)


@pytest.mark.parametrize(
    ("text", "mode", "expected", "warning"),
    [
        ("R", "thinking", Completion("R"), f"no </think> and no {EOS}"),
        (f"R{EOS}", "thinking", Completion("R"), f"{EOS} before </think>"),
        ("R</think>C", "thinking", Completion("R", "C"), f"no {EOS}"),
        (f"R{block(CALL)}{EOS}", "thinking", Completion("R", "", WHOLE), "a tool block before </think>"),
        (f"<think>R</think>C{EOS}", "thinking", Completion("R", "C"), "<think> in reasoning was dropped"),
        (f"</think>C{EOS}", "chat", Completion("", "C"), "</think> in content was dropped"),
        ("C", "chat", Completion("", "C"), f"no {EOS}"),
        ("a <", "chat", Completion("", "a <"), f"no {EOS}"),
        (f"C\n\n<{DSML}tool_ca", "chat", Completion("", "C"), "inside a tag, which was dropped"),
        (f"C{block(CALL)[2:]}{EOS}", "chat", Completion("", "C", WHOLE), "no blank line before the tool block"),
        (f"C{block(CALL)}", "chat", Completion("", "C", WHOLE), f"no {EOS}"),
        (
            f"C{block(CALL, CALL)[:-40]}",
            "chat",
            Completion("", "C", WHOLE),
            "the call of 'f' was dropped: the text ends inside it",
        ),
        (f"C{block(CALL)[: -len(DSML) - 14]}", "chat", Completion("", "C", WHOLE), "the tool block is cut"),
        (f"C{block(CALL)}and{EOS}", "chat", Completion("", "C", WHOLE), "text after the tool block was dropped: 'and'"),
        (f"C{EOS}and", "chat", Completion("", "C"), f"text after {EOS} was dropped: 'and'"),
        (
            f"{block(CALL.replace('invoke name=', 'invoke nam=', 1), CALL)}{EOS}",
            "chat",
            Completion("", "", WHOLE),
            "a call was dropped",
        ),
        (
            f"{block(CALL.replace('string=', 'strin=', 1), CALL)}{EOS}",
            "chat",
            Completion("", "", WHOLE),
            "a parameter's name should be",
        ),
        (
            f"{block(invoke(parameter('true', 'v'), parameter('true', 'w')), CALL)}{EOS}",
            "chat",
            Completion("", "", WHOLE),
            "comes twice",
        ),
        (f"{block(CALL.removesuffix(f'</{DSML}invoke>'))}{EOS}", "chat", Completion("", "", WHOLE), "'f' has no end tag"),
        (f"{block(invoke(parameter('true', 'v') + ' '))}{EOS}", "chat", Completion("", "", WHOLE), "between tags"),
    ],
)
def test_damage(text: str, mode: str, expected: Completion, warning: str) -> None:
    found, warnings = parse_lenient(text, mode)
    assert found == expected
    assert any(warning in line for line in warnings), warnings


@pytest.mark.parametrize("value", ["nonsense", "{'a': 1}", "NaN", "", "1 2", '"open'])
def test_bad_json_becomes_text(value: str) -> None:
    found, warnings = parse_lenient(f"{block(invoke(parameter('false', value)))}{EOS}", "chat")
    assert json.loads(found.tool_calls[0].arguments) == {"k": value}
    assert len(warnings) == 1 and "is not JSON" in warnings[0]
