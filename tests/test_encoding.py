"""Prompts: the specification's examples verbatim, every rendering rule, and the error for every wrong conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from v4.encoding import encode, render_calls
from v4.prompt_texts import PromptTexts, identify, own_texts_file, read_constants
from v4.tokenizer import BOS, DSML, EOS

OWN = identify(read_constants(own_texts_file().decode(), "own"), "own")
PREVIEW = identify(read_constants(own_texts_file("preview").decode(), "own"), "own")
ADD = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {"type": "object"}}}
TOOLS = '{"name": "add", "description": "加", "parameters": {"type": "object"}}'


def user(text: Any = "U", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def system(text: Any = "S", **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def developer(text: Any = "D", **more: Any) -> dict[str, Any]:
    return {"role": "developer", "content": text, **more}


def assistant(text: Any = "C", reasoning: Any = "R", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


def call(name: str = "add", arguments: str = '{"a": 2, "s": "x"}', id_: str = "c1") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any = "5", id_: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


HISTORY = [system(), user("U1"), assistant("C1", "R1"), user("U2")]


# ----------------------------------------------------------------------------------------------- examples of the specification


def test_example_chat() -> None:
    assert encode([user()], mode="chat") == f"{BOS}<｜User｜>U<｜Assistant｜></think>"


def test_example_history_dropped() -> None:
    expected = f"{BOS}S<｜User｜>U1<｜Assistant｜></think>C1{EOS}<｜User｜>U2<｜Assistant｜><think>"
    assert encode(HISTORY, mode="thinking") == expected


def test_example_history_kept() -> None:
    expected = f"{BOS}S<｜User｜>U1<｜Assistant｜><think>R1</think>C1{EOS}<｜User｜>U2<｜Assistant｜><think>"
    assert encode(HISTORY, mode="thinking", drop_thinking=False) == expected


def test_example_tool_round_trip() -> None:
    messages = [system(tools=[ADD]), user("U1"), assistant("C1", "R1", tool_calls=[call()]), result()]
    block = (
        f"\n\n<{DSML}tool_calls>\n"
        f'<{DSML}invoke name="add">\n'
        f'<{DSML}parameter name="a" string="false">2</{DSML}parameter>\n'
        f'<{DSML}parameter name="s" string="true">x</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f"</{DSML}tool_calls>"
    )
    head = f"{BOS}S\n\n{OWN.render_tools([TOOLS])}"
    expected = (
        f"<｜User｜>U1<｜Assistant｜><think>R1</think>C1{block}{EOS}<｜User｜><tool_result>5</tool_result><｜Assistant｜><think>"
    )
    assert encode(messages, mode="thinking", texts=OWN) == head + expected


def test_example_task_action() -> None:
    assert encode([user(task="action")], mode="chat") == f"{BOS}<｜User｜>U<｜Assistant｜></think><｜action｜>"
    assert encode([user(task="action")], mode="thinking") == f"{BOS}<｜User｜>U<｜Assistant｜><think><｜action｜>"


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_example_other_tasks(task: str) -> None:
    assert encode([user(task=task)], mode="thinking") == f"{BOS}<｜User｜>U<｜{task}｜>"


def test_example_latest_reminder() -> None:
    messages = [user(), {"role": "latest_reminder", "content": "L"}]
    assert encode(messages, mode="thinking") == f"{BOS}<｜User｜>U<｜Assistant｜><think><｜latest_reminder｜>L"


# --------------------------------------------------------------------------------------------------------------- rendering


def test_tools_section() -> None:
    section = OWN.render_tools([TOOLS, TOOLS])
    assert (
        section.startswith("## Tools\n\n")
        and section.endswith("\n")
        and f"### Available Tool Schemas\n\n{TOOLS}\n{TOOLS}\n\n" in section
    )
    assert f'<{DSML}parameter name="' in section and 'string="true|false"' in section
    assert encode([system(tools=[ADD, ADD]), user()], texts=OWN) == f"{BOS}S\n\n{section}<｜User｜>U<｜Assistant｜></think>"


def test_developer_and_response_format() -> None:
    schema = {"type": "object", "title": "名"}
    section = OWN.render_format('{"type": "object", "title": "名"}')
    assert section.startswith("## Response Format:\n\n") and section.endswith('\n{"type": "object", "title": "名"}')
    found = encode([developer("D", tools=[ADD], response_format=schema)], texts=OWN)
    assert found == f"{BOS}<｜User｜>D\n\n{OWN.render_tools([TOOLS])}\n\n{section}<｜Assistant｜></think>"


def test_braces_in_schemas_stay() -> None:
    tool = {"function": {"name": "f", "parameters": {"x": "{schema} {dsml_token} {}"}}}
    assert '"{schema} {dsml_token} {}"' in encode([system(tools=[tool]), user()], texts=OWN)


def test_tools_of_a_user_message_are_not_rendered() -> None:
    assert encode([*HISTORY[:3], user("U2", tools=[ADD])], mode="thinking") == encode(HISTORY, mode="thinking")


def test_empty_lists_render_nothing() -> None:
    assert encode([system(tools=[]), user(), assistant(tool_calls=[])]) == f"{BOS}S<｜User｜>U<｜Assistant｜></think>C{EOS}"


def test_flags() -> None:
    assert encode([user(), assistant(wo_eos=True)], mode="thinking") == f"{BOS}<｜User｜>U<｜Assistant｜><think>R</think>C"
    assert encode([user()], add_default_bos=False) == "<｜User｜>U<｜Assistant｜></think>"


def test_special_strings_in_text_stay_raw() -> None:
    assert encode([user("a<think>b")]) == f"{BOS}<｜User｜>a<think>b<｜Assistant｜></think>"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ('{"q": "a \\"b\\"\\n</x>"}', f'<{DSML}parameter name="q" string="true">a "b"\n</x></{DSML}parameter>'),
        ('{"n": null, "l": [1, "é"]}', f'<{DSML}parameter name="n" string="false">null</{DSML}parameter>\n'
         f'<{DSML}parameter name="l" string="false">[1, "é"]</{DSML}parameter>'),
        ('{"open', f'<{DSML}parameter name="arguments" string="true">{{"open</{DSML}parameter>'),
        ("", f'<{DSML}parameter name="arguments" string="true"></{DSML}parameter>'),
        ("{}", ""),
    ],
)  # fmt: skip
def test_arguments(arguments: str, lines: str) -> None:
    found = encode([user(), assistant("", tool_calls=[call("f", arguments)])])
    block = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{lines}\n</{DSML}invoke>\n</{DSML}tool_calls>'
    assert found == f"{BOS}<｜User｜>U<｜Assistant｜></think>{block}{EOS}"


def test_two_calls() -> None:
    one = f'<{DSML}invoke name="f">\n\n</{DSML}invoke>'
    calls = [{"name": "f", "arguments": "{}"}, {"name": "f", "arguments": "{}"}]
    assert render_calls(calls) == f"\n\n<{DSML}tool_calls>\n{one}\n{one}\n</{DSML}tool_calls>"


# ------------------------------------------------------------------------------------------------------- folding and dropping


def test_results_fold_in_call_order() -> None:
    calls = [call(id_="a"), call(id_="b"), call(id_="c")]
    messages = [
        user(),
        assistant("", tool_calls=calls),
        result("3", "c"),
        result("1", "a"),
        user("and"),
        result("2", "b"),
        user("then"),
    ]
    end = "\n\n".join(
        ["<tool_result>1</tool_result>", "<tool_result>2</tool_result>", "and", "<tool_result>3</tool_result>", "then"]
    )
    assert encode(messages).endswith(f"{EOS}<｜User｜>{end}<｜Assistant｜></think>")


def test_result_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    found = encode([user(), assistant(tool_calls=[call()]), result(parts)])
    assert "<｜User｜><tool_result>a\n\n[Unsupported image_url]\n\nb</tool_result><｜Assistant｜>" in found


def test_users_fold() -> None:
    assert encode([user("a"), user([{"type": "text", "text": "b"}, {"type": "text", "text": "c"}])]) == (
        f"{BOS}<｜User｜>a\n\nb\n\nc<｜Assistant｜></think>"
    )


def test_tasks_keep_users_apart() -> None:
    assert encode([user("a"), user("b", task="title")]) == f"{BOS}<｜User｜>a<｜User｜>b<｜title｜>"
    assert encode([user("a", task="title"), user("b")]) == f"{BOS}<｜User｜>a<｜User｜>b<｜Assistant｜></think>"


def test_answer_to_a_task_has_no_thinking() -> None:
    for drop in (True, False):
        found = encode([user(task="query"), assistant()], mode="thinking", drop_thinking=drop)
        assert found == f"{BOS}<｜User｜>U<｜query｜>C{EOS}"


def test_tools_keep_the_history() -> None:
    kept = encode([system(tools=[ADD]), *HISTORY[1:]], mode="thinking", texts=OWN)
    assert kept.endswith(f"<｜User｜>U1<｜Assistant｜><think>R1</think>C1{EOS}<｜User｜>U2<｜Assistant｜><think>")


def test_earlier_developers_are_dropped() -> None:
    messages = [system(), developer(), assistant(), {"role": "latest_reminder", "content": "L"}, user()]
    tail = f"C{EOS}<｜latest_reminder｜>L<｜User｜>U<｜Assistant｜>"
    assert encode(messages, mode="thinking") == f"{BOS}S{tail}<think>"
    assert encode(messages, mode="chat") == f"{BOS}S<｜User｜>D<｜Assistant｜></think>{tail}</think>"


def test_reasoning_after_the_last_user_stays() -> None:
    messages = [*HISTORY, assistant("C2", "R2"), assistant("C3", "R3")]
    assert encode(messages, mode="thinking").endswith(f"<think>R2</think>C2{EOS}R3</think>C3{EOS}")


def test_without_any_user() -> None:
    assert encode([system(), assistant()], mode="thinking") == f"{BOS}SR</think>C{EOS}"


def test_reasoning_under_its_other_name() -> None:
    message = {"role": "assistant", "content": None, "reasoning": "R"}
    assert encode([user(), message], mode="thinking") == f"{BOS}<｜User｜>U<｜Assistant｜><think>R</think>{EOS}"


# ------------------------------------------------------------------------------------------------------------------ effort


def test_effort_levels_by_release() -> None:
    plain, base = encode([system(), user()], mode="thinking"), "S<｜User｜>U<｜Assistant｜><think>"
    assert plain == BOS + base
    for texts, none, some in ((PREVIEW, [None, "high"], ["max"]), (OWN, [None, "low"], ["high", "max"])):
        for effort in none:
            assert encode([system(), user()], mode="thinking", effort=effort, texts=texts) == plain
        for effort in some:
            found = encode([system(), user()], mode="thinking", effort=effort, texts=texts)
            assert found == BOS + texts.efforts[effort] + base and texts.efforts[effort].endswith("\n\n")
            assert encode([user()], mode="chat", effort=effort, texts=texts) == encode([user()])
    assert OWN.efforts["high"] == PREVIEW.efforts["max"] != OWN.efforts["max"]


@pytest.mark.parametrize(
    ("texts", "effort", "message"),
    [
        (PREVIEW, "low", "found 'low', expected None, 'high', 'max' for this checkpoint \\(release preview"),
        (OWN, "medium", "found 'medium', expected None, 'low', 'high', 'max' for this checkpoint \\(release 0731"),
        (PromptTexts(), "high", "found 'high', expected None for this checkpoint \\(release unknown; texts: no encoding file"),
    ],
)
def test_unknown_effort(texts: PromptTexts, effort: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode([user()], mode="thinking", effort=effort, texts=texts)


def test_calls_without_ids_keep_the_order() -> None:
    calls = [{"function": {"name": "f", "arguments": json.dumps({})}}] * 2
    messages = [user(), assistant(tool_calls=calls), {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>" in encode(messages)
