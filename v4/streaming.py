"""Parses completions while they arrive, and damaged ones as far as they go: never raises on text, reports warnings instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from v4.completion import (
    BLOCK,
    END_BLOCK,
    END_INVOKE,
    END_PARAMETER,
    INVOKE,
    PARAMETER,
    Completion,
    Event,
    ToolCall,
    check_mode,
    find,
    function_name,
    is_json,
    json_text,
)
from v4.tokenizer import BOS, END_THINK, EOS, THINK


def parse_lenient(text: str, mode: str) -> tuple[Completion, list[str]]:
    """Parse a completion that may be cut or damaged; returns what is usable, and what was wrong with it.

    Of a well-formed completion that ends with EOS it gives the same as `parse`, without warnings. Missing `</think>`: all text is
    reasoning, up to a tool block. A call that is cut or malformed is left out, the calls before it stay. A value with
    string="false" that is not JSON becomes a JSON string.
    """
    parser = StreamingParser(mode)
    parser.feed(text)
    parser.finish()
    return parser.completion, parser.warnings


_Stage = Literal["reasoning", "content", "gap", "name", "header", "value", "between", "skip", "after", "done"]

_BLOCKS = (f"\n\n{BLOCK}", f"\n{BLOCK}", BLOCK)
_MARKS: dict[_Stage, tuple[str, ...]] = {
    "reasoning": (END_THINK, THINK, BOS, EOS, *_BLOCKS),
    "content": (END_THINK, THINK, BOS, EOS, *_BLOCKS),
    "gap": (INVOKE, END_BLOCK),
    "name": (PARAMETER, END_INVOKE, INVOKE, END_BLOCK),
    "header": ('" string="true">', '" string="false">', END_PARAMETER),
    "value": (f"<{END_PARAMETER}", END_PARAMETER),
    "between": (PARAMETER, END_INVOKE, INVOKE, END_BLOCK),
    "skip": (END_INVOKE, INVOKE, END_BLOCK),
    "after": (EOS,),
    "done": (),
}
_AFTER_CALL: dict[str, _Stage] = {END_INVOKE: "gap", INVOKE: "name", END_BLOCK: "after"}


@dataclass
class _Call:
    name: str
    keys: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    text: bool = True
    """whether the value being read is a string"""


class StreamingParser:
    """Parses a completion while it is generated. How the text is split into deltas changes nothing in the result.

    Text comes out as it arrives, except for a tail that could be the start of a tag; arguments with string="false" come out when
    complete. After `finish()`, `completion` and `warnings` hold the result; the same rules as `parse_lenient`.
    """

    def __init__(self, mode: str) -> None:
        check_mode(mode)
        self.warnings: list[str] = []
        self._stage: _Stage = "reasoning" if mode == "thinking" else "content"
        self._buffer = ""
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[ToolCall] = []
        self._call: _Call | None = None
        self._started = 0
        self._events: list[Event] = []

    @property
    def completion(self) -> Completion:
        """What has been read so far."""
        return Completion("".join(self._texts["reasoning"]), "".join(self._texts["content"]), tuple(self._calls))

    def feed(self, delta: str) -> list[Event]:
        """Take more text; events that it completes."""
        self._buffer += delta
        while self._stage != "done":
            at, mark = find(self._buffer, _MARKS[self._stage])
            if at < 0:
                break
            before, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            self._take(before)
            self._mark(before, mark)
        streamed = self._stage in self._texts or (self._stage == "value" and self._call is not None and self._call.text)
        if streamed and (ready := len(self._buffer) - self._held()):
            before, self._buffer = self._buffer[:ready], self._buffer[ready:]
            self._take(before)
        return self._flush()

    def finish(self) -> list[Event]:
        """The text has ended; the last events. Nothing may be fed afterwards."""
        if self._stage == "done":
            if self._buffer:
                self._warn(f"text after {EOS} was dropped: {self._buffer[:40]!r}")
        elif self._stage == "after":
            self._dropped(self._buffer)
            self._warn(f"no {EOS} at the end")
        elif self._stage in self._texts:
            self._end_of_text()
        else:
            self._cut("the text ends inside it")
            self._warn("the tool block is cut")
        self._buffer, self._stage = "", "done"
        return self._flush()

    def _end_of_text(self) -> None:
        if "<｜" in self._buffer:  # the beginning of a special token or DSML tag
            self._warn(f"the text ends inside a tag, which was dropped: {self._buffer!r}")
        else:
            self._take(self._buffer)
        self._warn(f"no {END_THINK} and no {EOS}" if self._stage == "reasoning" else f"no {EOS} at the end")

    def _held(self) -> int:
        """Length of the longest tail of the buffer that is a proper beginning of a mark."""
        longest = min(len(self._buffer), max(map(len, _MARKS[self._stage])) - 1)
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self._buffer[-n:]) for m in _MARKS[self._stage])), 0)

    def _take(self, text: str) -> None:
        if not text:
            return
        if self._stage == "reasoning" or self._stage == "content":
            self._texts[self._stage].append(text)
            self._events.append(Event(self._stage, text))
        elif self._stage == "value" and self._call is not None and self._call.text:
            self._arguments(json_text(text)[1:-1])
        elif self._stage == "after":
            self._dropped(text)

    def _mark(self, before: str, mark: str) -> None:
        if self._stage == "reasoning" or self._stage == "content":
            self._text_mark(mark)
        elif self._stage == "after":
            self._stage = "done"
        elif self._stage == "skip":
            self._stage = _AFTER_CALL[mark]
        else:
            {"gap": self._gap, "name": self._named, "header": self._header, "value": self._value, "between": self._between}[
                self._stage
            ](before, mark)

    def _text_mark(self, mark: str) -> None:
        if mark in _BLOCKS:
            if self._stage == "reasoning":
                self._warn(f"a tool block before {END_THINK}")
            if mark != _BLOCKS[0]:
                self._warn("no blank line before the tool block")
            self._stage = "gap"
        elif mark == EOS:
            if self._stage == "reasoning":
                self._warn(f"{EOS} before {END_THINK}")
            self._stage = "done"
        elif mark == END_THINK and self._stage == "reasoning":
            self._stage = "content"
        else:
            self._warn(f"{mark} in {self._stage} was dropped")

    def _gap(self, before: str, mark: str) -> None:
        self._structure(before)
        self._stage = "name" if mark == INVOKE else "after"

    def _named(self, before: str, mark: str) -> None:
        name = function_name(before, empty=mark == END_INVOKE)
        if name is None:
            self._warn(f"a call was dropped: found {before[:40]!r} where its name should be")
            self._stage = _AFTER_CALL.get(mark, "skip")
            return
        self._call = _Call(name)
        self._events.append(Event("call", name, self._started))
        self._arguments("{")
        self._next(mark)

    def _header(self, before: str, mark: str) -> None:
        assert self._call is not None
        key = before.removeprefix(' name="')
        if mark == END_PARAMETER or key == before or key in self._call.keys:
            self._cut(
                f"parameter {key!r} comes twice"
                if key in self._call.keys
                else f"found {before[:40]!r} where a parameter's name should be"
            )
            self._stage = "skip"
            return
        self._call.text = mark == _MARKS["header"][0]
        self._arguments((", " if self._call.keys else "") + f"{json_text(key)}: {chr(34) if self._call.text else ''}")
        self._call.keys.append(key)
        self._stage = "value"

    def _value(self, before: str, mark: str) -> None:
        assert self._call is not None
        if mark == END_PARAMETER:
            self._warn(f"the end tag of parameter {self._call.keys[-1]!r} has no '<'")
        if self._call.text:
            self._arguments('"')
        elif is_json(before):
            self._arguments(before)
        else:
            self._warn(f"the value of parameter {self._call.keys[-1]!r} is not JSON and was taken as text: {before[:40]!r}")
            self._arguments(json_text(before))
        self._stage = "between"

    def _between(self, before: str, mark: str) -> None:
        self._structure(before)
        self._next(mark)

    def _next(self, mark: str) -> None:
        """Another parameter, or the end of the call."""
        if mark == PARAMETER:
            self._stage = "header"
            return
        assert self._call is not None
        if mark != END_INVOKE:
            self._warn(f"the call of {self._call.name!r} has no end tag")
        self._arguments("}")
        self._calls.append(ToolCall(self._call.name, "".join(self._call.pieces)))
        self._events.append(Event("call_end", "", self._started))
        self._call, self._stage = None, _AFTER_CALL[mark]
        self._started += 1

    def _cut(self, reason: str) -> None:
        if self._call is not None:
            self._warn(f"the call of {self._call.name!r} was dropped: {reason}")
            self._events.append(Event("call_cut", reason, self._started))
            self._call = None
            self._started += 1

    def _arguments(self, piece: str) -> None:
        if self._call is not None and piece:
            self._call.pieces.append(piece)
            self._events.append(Event("arguments", piece, self._started))

    def _structure(self, gap: str) -> None:
        if gap != ">\n":
            self._warn(f"found {gap[:40]!r} between tags, expected '>\\n'")

    def _dropped(self, text: str) -> None:
        if text:
            self._warn(f"text after the tool block was dropped: {text[:40]!r}")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self._events.append(Event("warning", text))

    def _flush(self) -> list[Event]:
        events, self._events = self._events, []
        return events
