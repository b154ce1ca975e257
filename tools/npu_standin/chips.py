"""Chips that the stand-in pretends to be: the name on the command line, the family as CANN's build names it, a device name of that family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """`alias` as users say it, `family` as CANN's build says it, `device` as the runtime says it."""

    alias: str
    family: str
    device: str


CHIPS = (Chip("a2", "910b", "Ascend910B2"), Chip("a3", "910_93", "Ascend910_9391"), Chip("950", "950", "Ascend950PR_9599"))


def chip(name: str) -> Chip:
    """The chip with this alias or family. ValueError lists the known ones."""
    for known in CHIPS:
        if name in (known.alias, known.family):
            return known
    raise ValueError(f"unknown SoC {name!r}; the stand-in knows {', '.join(f'{c.alias} ({c.family})' for c in CHIPS)}")
