"""Renders a conversation in OpenAI form as the prompt text of DeepSeek-V4 (specification 11.2 to 11.5).

Text of messages goes into the prompt raw, as in the official encoder: special strings inside it become special tokens. A caller
with untrusted text that must not do that has to refuse or alter it first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from v4.prompt_texts import PromptTexts
from v4.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, TASK_TOKENS, THINK, USER

MODES = ("chat", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

Message = Mapping[str, Any]

_PART = "{'type': 'text', 'text': ...}"


@dataclass
class Turn:
    """One message after folding. `blocks` are user texts and tool results; `where` names it in errors."""

    role: str
    where: str
    text: str = ""
    blocks: list[tuple[str | None, str]] = field(default_factory=list)
    """(id of the tool call or None for a text, text as rendered)"""
    task: str | None = None
    tools: list[str] = field(default_factory=list)
    response_format: str | None = None
    calls: list[Message] = field(default_factory=list)
    reasoning: str = ""
    eos: bool = True


def encode(
    messages: Sequence[Message],
    *,
    mode: str = "chat",
    effort: str | None = None,
    drop_thinking: bool = True,
    texts: PromptTexts | None = None,
    add_default_bos: bool = True,
) -> str:
    """Prompt text of a conversation.

    messages: dicts with `role` and `content` (text; a list of text parts for user and tool), and where they apply
    `reasoning_content`, `tool_calls`, `tool_call_id`, `tools`, `response_format`, `task`, `wo_eos`. mode: "chat" or "thinking".
    effort: level of the checkpoint's release, only felt in thinking mode. drop_thinking: leave out the reasoning of earlier turns
    (forced off by tools). texts: fixed texts of the checkpoint. add_default_bos: start with the begin-of-sentence token.
    Raises ValueError for a wrong conversation, naming the message, what was found, what was expected and what to do.
    """
    if mode not in MODES:
        raise ValueError(f"mode: found {mode!r}, expected 'chat' or 'thinking'")
    texts = PromptTexts() if texts is None else texts
    preamble = texts.preamble(effort)
    thinking = mode == "thinking"
    turns = fold(messages)
    drop = drop_thinking and not any(turn.tools for turn in turns)
    if thinking and drop:
        turns = drop_history(turns)
    last_user = _last_user(turns)
    prompt = BOS if add_default_bos else ""
    prompt += preamble if thinking else ""
    for i, turn in enumerate(turns):
        before, after = (turns[i - 1] if i else None), (turns[i + 1] if i + 1 < len(turns) else None)
        shown = thinking and (not drop or i > last_user) and (before is None or before.task is None)
        prompt += _render(turn, shown, texts)
        if after is None or after.role in ("assistant", "latest_reminder"):
            prompt += _transition(turn, thinking, thinking and (not drop or i >= last_user))
    return prompt


def fold(messages: Sequence[Message]) -> list[Turn]:
    """Check the messages, fold tool results and neighbouring user messages into one turn, order results as they were called.

    A user message that carries a task stays a turn of its own, and a user message after it starts a new one.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: found {_kind(messages)}, expected a list with at least one message")
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        turn = _read(message, i)
        last = turns[-1] if turns and turns[-1].role == "user" else None
        if turn.role == "tool":
            _check_result(turn, turns)
            turn = replace(turn, role="user")
        elif turn.role != "user" or turn.task is not None or (last and last.task is not None):
            last = None
        if last:
            last.blocks += turn.blocks
        else:
            turns.append(turn)
    calls: list[str] = []
    for turn in turns:
        if turn.role == "assistant":
            calls = _call_ids(turn)
        elif turn.role == "user":
            order = {id_: n for n, id_ in enumerate(calls)}
            results = iter(sorted((b for b in turn.blocks if b[0] is not None), key=lambda block: order.get(block[0] or "", 0)))
            turn.blocks = [block if block[0] is None else next(results) for block in turn.blocks]
    return turns


def drop_history(turns: list[Turn]) -> list[Turn]:
    """Turns without the developer messages before the last user or developer turn; reasoning there is left out on rendering."""
    last_user = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if i >= last_user or turn.role != "developer"]


def render_calls(calls: Sequence[Message]) -> str:
    """The DSML block of tool calls, with the two newlines before it."""
    lines = [f'<{DSML}invoke name="{call["name"]}">\n{_parameters(call["arguments"])}\n</{DSML}invoke>' for call in calls]
    return "\n\n" + "\n".join([f"<{DSML}tool_calls>", *lines, f"</{DSML}tool_calls>"])


def _parameters(arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except ValueError:
        values = {"arguments": arguments}
    return "\n".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value, 'arguments')}</{DSML}parameter>"
        for key, value in values.items()
    )


def _last_user(turns: list[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _render(turn: Turn, reasoning_shown: bool, texts: PromptTexts) -> str:
    if turn.role == "user":
        return USER + "\n\n".join(text for _, text in turn.blocks)
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + turn.text
    if turn.role == "assistant":
        thought = turn.reasoning + END_THINK if reasoning_shown else ""
        return thought + turn.text + (render_calls(turn.calls) if turn.calls else "") + (EOS if turn.eos else "")
    text = (USER if turn.role == "developer" else "") + turn.text
    if turn.tools:
        text += "\n\n" + texts.render_tools(turn.tools)
    if turn.response_format is not None:
        text += "\n\n" + texts.render_format(turn.response_format)
    return text


def _transition(turn: Turn, thinking: bool, think_next: bool) -> str:
    if turn.task == "action":
        return ASSISTANT + (THINK if thinking else END_THINK) + TASK_TOKENS["action"]
    if turn.task is not None:
        return TASK_TOKENS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK if think_next else END_THINK)
    return ""


def _read(message: Message, i: int) -> Turn:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise _wrong(where, _kind(message), "an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(where, f"role {role!r}", f"one of {', '.join(ROLES)}")
    where = f"{where} ({role})"
    task = message.get("task")
    if task is not None and (task not in TASK_TOKENS or role == "tool"):
        raise _wrong(where, f"task {task!r}", "none on a tool message" if role == "tool" else f"one of {', '.join(TASK_TOKENS)}")
    turn = Turn(role, where, task=task)
    content = message.get("content", "")
    if role in ("user", "tool"):
        turn.blocks = [(None, text) for text in _texts(content, where, unsupported=role == "tool")]
        if role == "tool":
            result = "\n\n".join(text for _, text in turn.blocks)
            turn.blocks = [
                (_string(message.get("tool_call_id") or "", where, "tool_call_id"), f"<tool_result>{result}</tool_result>")
            ]
        return turn
    turn.text = _string("" if content is None and role in ("system", "assistant") else content, where, "content")
    if role == "developer" and not turn.text:
        raise _wrong(where, "no text", "some; put the instruction into content, or use a system message")
    turn.tools = _tools(message.get("tools"), where)
    if message.get("response_format"):
        turn.response_format = _json(message["response_format"], f"{where}: response_format")
    if role == "assistant":
        turn.calls = _calls(message.get("tool_calls"), where)
        turn.reasoning = _reasoning(message, where)
        turn.eos = not message.get("wo_eos", False)
    return turn


def _reasoning(message: Message, where: str) -> str:
    found = {key: message[key] for key in ("reasoning_content", "reasoning") if message.get(key) is not None}
    if len(set(map(repr, found.values()))) > 1:
        raise _wrong(where, "different texts under reasoning_content and reasoning", "one of the two; leave the other out")
    return next((_string(value, where, key) for key, value in found.items()), "")


def _texts(content: Any, where: str, *, unsupported: bool) -> list[str]:
    """Text parts of a content; parts of other types become a note in tool results and an error elsewhere."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise _wrong(where, f"content {_kind(content)}", f"a text or a list of parts {_PART}")
    texts: list[str] = []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or (kind != "text" and not unsupported):
            found = f"a part of type {kind!r}" if kind else _kind(part)
            raise _wrong(where, f"{found} as content[{n}]", f"{_PART}; the model reads text only")
        texts.append(_string(part.get("text", ""), where, f"content[{n}].text") if kind == "text" else f"[Unsupported {kind}]")
    return texts


def _function(item: Any, where: str, example: str) -> Mapping[str, Any]:
    function = item.get("function") if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _wrong(where, f"a value {_kind(item)} without a function that has a name", example)
    return function


def _tools(tools: Any, where: str) -> list[str]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise _wrong(where, f"tools {_kind(tools)}", "a list of OpenAI function objects")
    example = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
    return [_json(_function(tool, f"{where}: tools[{n}]", example), f"{where}: tools[{n}]") for n, tool in enumerate(tools)]


def _calls(calls: Any, where: str) -> list[Message]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise _wrong(where, f"tool_calls {_kind(calls)}", "a list of OpenAI tool calls")
    result: list[Message] = []
    for n, call in enumerate(calls):
        at = f"{where}: tool_calls[{n}]"
        function = _function(call, at, '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}')
        arguments = _string(function.get("arguments"), at, "arguments")
        try:
            found = json.loads(arguments)
        except ValueError:
            found = {}
        if not isinstance(found, dict):
            raise _wrong(at, f"arguments {_kind(found)}", "the JSON text of an object, such as '{\"key\": 1}'")
        result.append({"id": call.get("id") or function.get("id") or "", "name": function["name"], "arguments": arguments})
    return result


def _call_ids(turn: Turn) -> list[str]:
    return [call["id"] for call in turn.calls]


def _check_result(turn: Turn, turns: list[Turn]) -> None:
    asked = next((earlier for earlier in reversed(turns) if earlier.role == "assistant"), None)
    ids = _call_ids(asked) if asked else []
    if not ids:
        raise _wrong(
            turn.where, "a tool result", "tool_calls on the assistant message before it; add them, or leave the result out"
        )
    found = turn.blocks[0][0]
    if (any(ids) or found) and found not in [id_ for id_ in ids if id_]:
        known = ", ".join(repr(id_) for id_ in ids)
        raise _wrong(turn.where, f"tool_call_id {found!r}", f"the id of a call of the assistant message before it ({known})")


def _string(value: Any, where: str, what: str) -> str:
    if not isinstance(value, str):
        hint = "; give JSON text, as json.dumps writes it" if what == "arguments" else ""
        raise _wrong(where, f"{what} {_kind(value)}", f"a text{hint}")
    return value


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise _wrong(where, f"a value that JSON cannot hold ({error})", "numbers, texts, lists and objects") from error


def _wrong(where: str, found: str, expected: str) -> ValueError:
    return ValueError(f"{where}: found {found}, expected {expected}")


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}" if value is not None else "null"
