"""Reads a completion of DeepSeek-V4: reasoning, content and DSML tool calls (specification 11.6).

`parse` refuses every violation; `parse_lenient` and `StreamingParser` make the best of damaged text and say what was wrong.
"""

from __future__ import annotations

import re

from v4.completion import (
    BLOCK,
    END_BLOCK,
    END_INVOKE,
    END_PARAMETER,
    INVOKE,
    NOT_TEXT,
    PARAMETER,
    Completion,
    Event,
    ParseError,
    ToolCall,
    check_mode,
    find,
    function_name,
    json_text,
)
from v4.streaming import StreamingParser, parse_lenient
from v4.tokenizer import END_THINK, EOS

__all__ = ["Completion", "Event", "ParseError", "StreamingParser", "ToolCall", "parse", "parse_lenient"]

_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)<', re.DOTALL)


class _Reader:
    """Position in a completion."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def until(self, what: str, *marks: str) -> tuple[str, str]:
        """Text up to the earliest mark, and the mark, which is consumed."""
        found, mark = find(self.text, marks, self.at)
        if found < 0:
            raise ParseError(len(self.text), f"the text ends, expected {what}")
        before, self.at = self.text[self.at : found], found + len(mark)
        return before, mark

    def structure(self, what: str, *marks: str) -> str:
        """The next mark, before which only ">" and a line break may stand."""
        start = self.at
        gap, mark = self.until(what, *marks)
        if gap != ">\n":
            raise ParseError(start, f"found {gap[:60]!r} between tags, expected '>\\n'")
        return mark


def parse(text: str, *, mode: str) -> Completion:
    """Parse one complete completion, EOS included. Arguments with string="false" go into the JSON text unchecked.

    mode: "chat" or "thinking". Raises ParseError with position and reason on every violation.
    """
    check_mode(mode)
    reader = _Reader(text)
    reasoning = ""
    if mode == "thinking":
        reasoning, mark = reader.until(END_THINK, END_THINK, f"\n\n{BLOCK}")
        if mark != END_THINK:
            raise ParseError(len(reasoning), f"found a tool block before {END_THINK}, expected the reasoning to end first")
    start = reader.at
    content, mark = reader.until(f"{EOS} or a tool block", EOS, f"\n\n{BLOCK}")
    for what, offset, part in (("reasoning", 0, reasoning), ("content", start, content)):
        at, special = find(part, NOT_TEXT)
        if special:
            raise ParseError(offset + at, f"found {special} in {what}, expected text")
    calls: list[ToolCall] = []
    if mark != EOS:
        while reader.structure(f"{INVOKE} or {END_BLOCK}", INVOKE, END_BLOCK) == INVOKE:
            calls.append(_call(reader))
        if text.startswith(EOS, reader.at):
            reader.at += len(EOS)
    if reader.at != len(text):
        raise ParseError(reader.at, f"found {text[reader.at :][:60]!r}, expected nothing after the end of the turn")
    return Completion(reasoning, content, tuple(calls))


def _call(reader: _Reader) -> ToolCall:
    start = reader.at
    header, mark = reader.until(f"{PARAMETER} or {END_INVOKE}", PARAMETER, END_INVOKE)
    name = function_name(header, empty=mark == END_INVOKE)
    if name is None:
        raise ParseError(start, f"found {header[:60]!r} after {INVOKE}, expected ' name=\"...\">\\n'")
    values: dict[str, str] = {}
    while mark == PARAMETER:
        start = reader.at
        body, _ = reader.until(END_PARAMETER, END_PARAMETER)
        found = _PARAMETER.fullmatch(body)
        if not found:
            raise ParseError(start, f'found {body[:60]!r} after {PARAMETER}, expected \' name="..." string="true|false">...<\'')
        key, flag, value = found.groups()
        if key in values:
            raise ParseError(start, f"found parameter {key!r} twice in one call, expected every name once")
        values[key] = json_text(value) if flag == "true" else value
        mark = reader.structure(f"{PARAMETER} or {END_INVOKE}", PARAMETER, END_INVOKE)
    return ToolCall(name, "{" + ", ".join(f"{json_text(key)}: {value}" for key, value in values.items()) + "}")
