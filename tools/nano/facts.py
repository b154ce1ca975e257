"""Facts that can be asked for: a key of two words and an answer of three tokens, in two families."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from tools.nano.words import COLOURS, NAMES, OBJECTS, PLACES, WORDS


class Fact(NamedTuple):
    """statement: the sentence up to the answer; answer: three tokens, each with the space before it; question: asks for it."""

    statement: str
    answer: tuple[str, str, str]
    question: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.statement}{''.join(self.answer)}."


FAMILIES = ("code", "password")


def keys(family: str) -> list[tuple[str, str]]:
    """Every key of a family. ValueError for an unknown family."""
    if family == "code":
        return [(c, o) for c in COLOURS for o in OBJECTS]
    if family == "password":
        return [(n, p) for n in NAMES for p in PLACES]
    raise ValueError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")


def make(family: str, key: tuple[str, str], r: Random) -> Fact:
    """A fact with a random answer: three digits for a code, three words for a password. ValueError for an unknown family."""
    a, b = key
    if family == "code":
        digits = [f" {r.randrange(10)}" for _ in range(3)]
        return Fact(f"The code of the {a} {b} is", (digits[0], digits[1], digits[2]), f"What is the code of the {a} {b}?")
    if family == "password":
        words = [f" {w}" for w in r.choices(WORDS, k=3)]
        return Fact(f"The password of {a} from {b} is", (words[0], words[1], words[2]), f"What is the password of {a} from {b}?")
    raise ValueError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")


def several(r: Random, count: int, family: str | None = None) -> list[Fact]:
    """`count` facts with different keys, of one family or of both mixed. ValueError for more facts than there are keys."""
    pool = [(f, k) for f in ([family] if family else FAMILIES) for k in keys(f)]
    if count > len(pool):
        raise ValueError(f"{count} facts: there are {len(pool)} different keys")
    return [make(f, k, r) for f, k in r.sample(pool, count)]
