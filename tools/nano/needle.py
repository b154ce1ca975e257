"""One retrieval trial: a fact at a given depth among story text and distractor facts with other keys, then the question."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from tools.nano.batches import Encoder
from tools.nano.facts import several
from tools.nano.grammar import sentences
from v4.tokenizer import ASSISTANT, BOS, END_THINK, USER

DISTRACTORS = 0.25
"""Share of the context that is facts with other keys (never more facts than 600)."""


class Case(NamedTuple):
    """ids: the prompt up to where the assistant starts; lead: what comes before the answer; answer: its three token ids."""

    ids: list[int]
    lead: str
    answer: list[int]
    text: str


def prompt(r: Random, encoder: Encoder, length: int, depth: float) -> Case:
    """A prompt of at most `length` tokens and about as many, the needle at `depth` (0: start, 1: end, just before the question).

    ValueError for a length too short for needle and question.
    """
    if length < 80:
        raise ValueError(f"length {length}: a needle, a distractor and a question need at least 80 tokens")
    facts = several(r, max(2, min(600, int(length * DISTRACTORS / 12))))
    needle, others = facts[0], [f" {f.text}" for f in facts[1:]]
    lines = sentences(r, int(length * (1 - DISTRACTORS) / 12) + 8)
    for text in others:
        lines.insert(r.randint(0, len(lines)), text)
    head = encoder(f"{BOS}{USER}Read this.")
    tail = encoder(f"\n\n{needle.question}{ASSISTANT}{END_THINK}")
    planted = encoder(f" {needle.text}")
    room = length - len(head) - len(tail) - len(planted)
    body: list[list[int]] = []
    for line in lines:
        new = encoder(line)
        if len(new) > room:
            break
        body.append(new)
        room -= len(new)
    body.insert(round(depth * len(body)), planted)
    ids = [*head, *(i for line in body for i in line), *tail]
    answer = encoder("".join(needle.answer))
    return Case(ids, needle.statement, answer, "".join(needle.answer))
