"""Names of tokens: what a server calls a token (its id, its text, its bytes, its entry in the vocabulary), and which of ours it is."""

from __future__ import annotations

from v4.tokenizer import Tokenizer

Key = int | str
"""A token: its id, or its text where the server gives no ids."""

BYTES = "bytes:"
"""Begins the name of a token that is no text, in OpenAI's form: bytes:\\xe4\\xbd."""

REPLACEMENT = "\ufffd"
"""What servers write for any piece of a character."""

# the alphabet in which byte-level vocabularies are written: printable bytes stand for themselves, the others for U+0100 and up
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {**{chr(byte): byte for byte in _PRINTABLE}, **{chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}}
_LETTER_OF = {byte: letter for letter, byte in _BYTE_OF.items()}


def named(data: bytes) -> str:
    """The name of a token of these bytes: its text, or the form with BYTES where they are no text on their own."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return BYTES + "".join(f"\\x{byte:02x}" for byte in data)


def from_vocabulary(name: Key) -> Key:
    """The text of a token that is named as in the vocabulary (" the" for "Ġthe"); what is no such name stays."""
    if isinstance(name, int) or not all(letter in _BYTE_OF for letter in name):
        return name
    return named(bytes(_BYTE_OF[letter] for letter in name))


class Names:
    """Ids of token texts, and whether a server's token is ours. Without a tokenizer only ids are understood.

    vocabulary: ids that the model has, from 0.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ids: dict[bytes, int | None] | None = None

    def text(self, token: int) -> str:
        """Text of one token; bytes that are no UTF-8 on their own become U+FFFD. The id itself where no tokenizer knows it."""
        own = self._own(token)
        return f"{token}" if own is None else own.decode("utf-8", "replace")

    def _own(self, token: int) -> bytes | None:
        if self._tokenizer is None:
            return None
        try:
            return self._tokenizer.token_bytes(token)
        except ValueError:
            # a vocabulary may have holes, and the model more ids than the tokenizer
            return None

    def same(self, found: Key | None, token: int) -> bool:
        """Whether the server's token may be `token`. A piece of a character has no text of its own: any text passes for it."""
        if found is None or isinstance(found, int):
            return found is None or found == token
        own = self._own(token)
        if own is None or self._tokenizer is None:
            return True
        if found.startswith(BYTES) and _unescaped(found) == own:
            return True
        try:
            whole = own.decode("utf-8")
        except UnicodeDecodeError:
            return not found.startswith(BYTES)
        return found == whole or (found == "" and self._tokenizer.is_special(token))

    def as_in_vocabulary(self, found: Key | None, token: int) -> bool:
        """Whether `found` is `token` as the vocabulary writes it, and not also as text."""
        own = self._own(token)
        return own is not None and found == "".join(_LETTER_OF[byte] for byte in own) != own.decode("utf-8", "replace")

    def resolve(self, key: Key) -> int | None:
        """The id of a token; None where its text does not belong to exactly one token, or the model has no such id."""
        if isinstance(key, int):
            return key if 0 <= key < self._vocabulary else None
        if self._tokenizer is None:
            return None
        if self._ids is None:
            self._ids = {}
            for token in range(min(self._tokenizer.vocab_size, self._vocabulary)):
                if (own := self._own(token)) is not None:
                    self._ids[own] = None if own in self._ids else token
        if REPLACEMENT in key:
            return None
        data = _unescaped(key) if key.startswith(BYTES) else key.encode("utf-8", "surrogatepass")
        return self._ids.get(data)


def _unescaped(text: str) -> bytes:
    # OpenAI's form of a token that is no text: bytes:\xe4\xbd
    try:
        return text.removeprefix(BYTES).encode("ascii").decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return text.encode("utf-8", "surrogatepass")
