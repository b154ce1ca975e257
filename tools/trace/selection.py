"""Which calls a verb looks at: the options --places, --only and --steps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from ops.contract import CONTRACTS
from ops.trace import Selection


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _numbers(option: str, text: str) -> list[int]:
    found: list[int] = []
    for part in filter(None, text.split(",")):
        m = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if m is None or (m[2] and int(m[2]) < int(m[1])):
            raise ValueError(f"{option}: found {part!r}, expected numbers and ranges such as 0-2,5")
        found += range(int(m[1]), int(m[2] or m[1]) + 1)
    return found


def _places(text: str, known: Collection[str]) -> frozenset[str]:
    found = []
    for part in filter(None, text.split(",")):
        found += [f"layers.{n}" for n in _numbers("--places", part)] if part[0].isdigit() else [part]
    for place in found:
        if place not in known:
            listed = (
                ", ".join(sorted(known))
                if len(known) < 8
                else f"layers.0 to layers.{sum(k.startswith('layers') for k in known) - 1}, head"
            )
            raise ValueError(f"--places: there is no part {place!r}; known: {listed}{_nearest(place, sorted(known))}")
    return frozenset(found)


def _ops(text: str) -> frozenset[str]:
    found = frozenset(filter(None, text.split(",")))
    for op in sorted(found):
        if op not in CONTRACTS:
            raise ValueError(f"--only: there is no op {op!r}{_nearest(op, sorted(CONTRACTS))}")
    return found


def parse(places: str | None, only: str | None, steps: str | None, known: Collection[str]) -> Selection:
    """The selection that the options ask for; `known` are the parts of the model. ValueError names what is wrong and what is known."""
    return Selection(
        places=None if places is None else _places(places, known),
        ops=None if only is None else _ops(only),
        steps=None if steps is None else frozenset(_numbers("--steps", steps)),
    )
