"""What a completion of DeepSeek-V4 consists of, and the tags and small rules that the strict and the streaming parser share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from v4.encoding import MODES
from v4.tokenizer import BOS, DSML, END_THINK, EOS, THINK

BLOCK, END_BLOCK = f"<{DSML}tool_calls", f"</{DSML}tool_calls>"
INVOKE, END_INVOKE = f"<{DSML}invoke", f"</{DSML}invoke"
PARAMETER, END_PARAMETER = f"<{DSML}parameter", f"/{DSML}parameter"
NOT_TEXT = (BOS, EOS, THINK, END_THINK, DSML)


class ParseError(ValueError):
    """A completion that violates the format; `position` is the offset in characters, `reason` says what is wrong there."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"completion, character {position}: {reason}")
        self.position, self.reason = position, reason


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments as the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Completion:
    """What one assistant turn consists of."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Event:
    """One piece of a streamed completion.

    kind and text: "reasoning" or "content" (more text), "call" (function name), "arguments" (more JSON text; all pieces of a call
    make its object), "call_end" (""), "call_cut" (why the call is void, forget its pieces), "warning" (what was wrong).
    index: number of the call, else -1.
    """

    kind: Literal["reasoning", "content", "call", "arguments", "call_end", "call_cut", "warning"]
    text: str = ""
    index: int = -1


def check_mode(mode: str) -> None:
    """Raise ValueError unless the mode is "chat" or "thinking"."""
    if mode not in MODES:
        raise ValueError(f"mode: found {mode!r}, expected 'chat' or 'thinking'")


def json_text(text: str) -> str:
    """A text as a JSON string, non-ASCII kept."""
    return json.dumps(text, ensure_ascii=False)


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def find(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Position and string of the earliest mark, the longest one on a tie; (-1, "") when there is none."""
    hits = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark, start)) >= 0]
    return (min(hits)[0], min(hits)[2]) if hits else (-1, "")


def function_name(header: str, *, empty: bool) -> str | None:
    """Function name of ` name="...">` and a line break; a call without parameters may have an empty line after it."""
    end = '">\n\n' if empty and header.endswith('">\n\n') else '">\n'
    begin = ' name="'
    return (
        header[len(begin) : -len(end)]
        if header.startswith(begin) and header.endswith(end) and len(header) >= len(begin + end)
        else None
    )
