"""What is scored: prompts of a file (JSON lines or plain lines) or the built-in ones, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.runconfig import nearest
from v4.encoding import MODES, encode
from v4.prompt_texts import PromptTexts
from v4.tokenizer import BOS, Tokenizer

BUILT_IN = Path(__file__).parent / "prompts.jsonl"
_KEYS = ("id", "text", "messages", "mode", "effort", "ids")
_SOURCES = ("text", "messages", "ids")


@dataclass(frozen=True)
class Prompt:
    """One text: `ids` [n >= 2], and `text` that encodes to them (None: given by ids that no text encodes to)."""

    id: str
    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Reader:
    """Turns lines into prompts. tokenizer: None when the checkpoint has none, prompts are then ids. limit: most tokens."""

    tokenizer: Tokenizer | None
    texts: PromptTexts
    vocabulary: int
    limit: int

    def read(self, path: Path | None, count: int | None = None) -> list[Prompt]:
        """The first `count` prompts of a file (default: of the built-in set). ValueError names the line and what is wrong."""
        file = path or BUILT_IN
        if path is None and self.tokenizer is None:
            raise ValueError("the built-in prompts are texts, and the checkpoint has no tokenizer.json; give ids with --prompts")
        if count is not None and count < 1:
            raise ValueError(f"--limit: found {count}, expected at least 1")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}; expected a .jsonl or .txt file of prompts") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if file.suffix not in (".jsonl", ".txt"):
            raise ValueError(f"{file}: found suffix {file.suffix!r}, expected .jsonl (an object a line) or .txt (a text a line)")
        prompts: list[Prompt] = []
        seen: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and (count is None or len(prompts) < count):
                row = {"text": line.rstrip("\r")} if file.suffix == ".txt" else _object(line, f"{file}:{number}")
                prompt = self._prompt(row, f"{file}:{number}", str(number))
                if prompt.id in seen:
                    raise ValueError(
                        f"{file}:{number}: id {prompt.id!r} stands in line {seen[prompt.id]} already; name each once"
                    )
                seen[prompt.id] = number
                prompts.append(prompt)
        if not prompts:
            raise ValueError(f"{file}: found no prompts; expected one a line")
        return prompts

    def _prompt(self, row: Mapping[str, Any], where: str, number: str) -> Prompt:
        for key in row:
            if key not in _KEYS:
                raise ValueError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
        given = [key for key in _SOURCES if key in row]
        if len(given) != 1:
            raise ValueError(f"{where}: found {' and '.join(given) or 'no prompt'}, expected one of {', '.join(_SOURCES)}")
        name = row.get("id", number)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"{where}: id is {name!r}, expected a text")
        if given != ["messages"] and (extra := [key for key in ("mode", "effort") if key in row]):
            raise ValueError(f"{where}: {extra[0]} belongs to messages, found {given[0]}; leave it out")
        prompt = self._from_ids(row["ids"], where) if given == ["ids"] else self._from_text(row, where)
        if len(prompt.ids) < 2:
            raise ValueError(f"{where}: found {len(prompt.ids)} tokens, expected at least 2 (the first has no log-probability)")
        if len(prompt.ids) > self.limit:
            raise ValueError(f"{where}: found {len(prompt.ids)} tokens, the model takes {self.limit}; shorten the prompt")
        return Prompt(_sound(str(name), where), prompt.ids, prompt.text)

    def _from_ids(self, found: Any, where: str) -> Prompt:
        sound = isinstance(found, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in found)
        if not sound or any(not 0 <= i < self.vocabulary for i in found):
            raise ValueError(f"{where}: ids: expected a list of integers in [0, {self.vocabulary})")
        text = None
        if self.tokenizer is not None and all(i < self.tokenizer.vocab_size for i in found):
            text = self.tokenizer.decode(found)
            text = text if self.tokenizer.encode(text) == found else None
        return Prompt("", tuple(found), text)

    def _from_text(self, row: Mapping[str, Any], where: str) -> Prompt:
        if self.tokenizer is None:
            raise ValueError(f"{where}: the checkpoint has no tokenizer.json; give the prompt as ids")
        if "text" in row:
            text = row["text"]
            if not isinstance(text, str):
                raise ValueError(f"{where}: text is a {type(text).__name__}, expected a text")
            text = text if text.startswith(BOS) else BOS + text
        else:
            mode = row.get("mode", "chat")
            if mode not in MODES:
                raise ValueError(f"{where}: mode {mode!r}{nearest(mode, MODES)}")
            try:
                text = encode(row["messages"], mode=mode, effort=row.get("effort"), texts=self.texts)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return Prompt("", tuple(self.tokenizer.encode(_sound(text, where))), text)


def _sound(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: found half of a surrogate pair (character {error.start}), expected Unicode text") from None
    return text


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{where}: found a {type(found).__name__}, expected an object such as {{"id": "a", "text": "..."}}')
    return found
