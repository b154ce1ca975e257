"""Planting a fault in a whole model: one mutant, everywhere or in one place, at every step or at one.

A plant is written OP:MUTANT[@PLACE][#STEP], for instance sparse_attention:sink_scaled@layers.3#5. Places are "layers.N", "mtp.N" and
"head"; steps count the calls of the op in that place, from 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ops.mutants.core import MUTANTS, Variant

_FORM = re.compile(r"(?P<op>\w+):(?P<name>[\w.]+)(@(?P<place>[\w.]+))?(#(?P<step>\d+))?")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Plant:
    """A mutant and where it sits: place None is everywhere, step None every call."""

    variant: Variant
    place: str | None = None
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Plant:
        """Read OP:MUTANT[@PLACE][#STEP]. ValueError for another form, an unknown op or an unknown mutant (the known ones listed)."""
        m = _FORM.fullmatch(text)
        if m is None:
            raise ValueError(f"plant: found {text!r}, expected OP:MUTANT[@PLACE][#STEP], for instance rms_norm:nan@layers.2")
        op, name = m["op"], m["name"]
        if op not in MUTANTS:
            raise ValueError(f"plant: no mutants of op {op!r}{_nearest(op, list(MUTANTS))}")
        if name not in MUTANTS[op]:
            raise ValueError(
                f"plant: {op} has no mutant {name!r}{_nearest(name, list(MUTANTS[op]))}; it has {', '.join(MUTANTS[op])}"
            )
        return cls(MUTANTS[op][name], m["place"], None if m["step"] is None else int(m["step"]))

    def __str__(self) -> str:
        at = f"@{self.place}" if self.place else ""
        return f"{self.variant}{at}" + ("" if self.step is None else f"#{self.step}")

    @staticmethod
    def harmless(plants: Sequence[str]) -> str:
        """What to say of planted faults that were reached and of which the judge saw nothing."""
        return f"planted {', '.join(plants)}: reached, but no input of this run shows it; try another place, or a longer prompt"

    def meets(self, op: str, place: str, count: int) -> bool:
        """Whether the fault sits in call `count` of `op` at `place`."""
        return op == self.variant.op and self.place in (None, place) and self.step in (None, count)

    def scope(self, place: str, ops: SimpleNamespace, reached: set[Plant] | None = None) -> SimpleNamespace:
        """`ops` with the fault in, when `place` is the one meant (the form that `v4.load(scope=...)` takes).

        reached: the plant is added when its fault has run, so that one that a model never comes to does not pass for harmless.
        """
        if self.place not in (None, place):
            return ops
        correct = getattr(ops, self.variant.op)
        wrong, calls = self.variant.make(correct), [0]

        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if self.step not in (None, calls[0] - 1):
                return correct(*args, **kwargs)
            if reached is not None:
                reached.add(self)
            return wrong(*args, **kwargs)

        return SimpleNamespace(**{**vars(ops), self.variant.op: planted})
