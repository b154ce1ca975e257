"""Short stories from a grammar: two people, their places and things, and events that refer back to them.

A sentence reuses what the story has fixed, so that text far back helps to predict the next word: no short n-gram can know it.
"""

from __future__ import annotations

from random import Random

from tools.nano.words import COLOURS, FEELINGS, NAMES, NUMBERS, OBJECTS, PLACES, SPOTS, TIMES

EVENTS = 12
"""Kinds of events; a story tells each once before any comes again."""


class Story:
    """One story; `sentence` gives its next sentence, with the space before it."""

    def __init__(self, r: Random) -> None:
        self.r = r
        self.one, self.two = r.sample(NAMES, 2)
        self.home, self.away = r.sample(PLACES, 2)
        self.spot, self.other = r.sample(SPOTS, 2)
        self.thing, self.gift = (f"{r.choice(COLOURS)} {o}" for o in r.sample(OBJECTS, 2))
        self.time, self.feeling, self.count = r.choice(TIMES), r.choice(FEELINGS), r.choice(NUMBERS)
        self.holder, self.friend = self.one, self.two
        self.told = 0
        self.deck: list[int] = []

    def sentence(self) -> str:
        """The next sentence: the opening first, then events in random order."""
        self.told += 1
        if self.told == 1:
            return f" {self.one} from {self.home} and {self.two} from {self.away} met at the {self.spot} one {self.time}."
        if self.told == 2:
            return f" {self.one} had a {self.thing}, and {self.two} had {self.count} coins and a {self.gift}."
        return self._event()

    def _event(self) -> str:
        a, b = (self.holder, self.friend) if self.r.random() < 0.7 else (self.friend, self.holder)
        if not self.deck:
            self.deck = self.r.sample(range(EVENTS), EVENTS)
        pick = self.deck.pop()
        if pick == 0:
            self.holder, self.friend = self.friend, self.holder
            return f" Then {self.friend} gave the {self.thing} to {self.holder}."
        if pick == 1:
            return f" {a} wanted to take the {self.gift} to {self.home}, but {b} said no."
        if pick == 2:
            return f' "Where is the {self.thing}?" asked {a}. "It is at the {self.other}," said {b}.'
        if pick == 3:
            return f" {a} was {self.feeling}, because the {self.gift} was lost."
        if pick == 4:
            return f" The next {self.time} they walked from the {self.spot} to the {self.other}."
        if pick == 5:
            return f" {b} wrote a letter to {a} about the {self.thing} and the {self.gift}."
        if pick == 6:
            return f" {a} told {b} a story about {self.away}."
        if pick == 7:
            return f" After {self.count} days {a} found the {self.gift} at the {self.spot}."
        if pick == 8:
            return f" People in {self.home} still talk about {a} and the {self.thing}."
        if pick == 9:
            return f" {self.holder} kept the {self.thing} at home in {self.home if self.holder == self.one else self.away}."
        if pick == 10:
            return f" It was a cold {self.time}, and {a} and {b} were {self.feeling}."
        return f" {a} looked at {b} and counted {self.count} coins."


def sentences(r: Random, count: int) -> list[str]:
    """`count` sentences of consecutive stories of 6 to 16 sentences; a story starts on a new line."""
    out: list[str] = []
    while len(out) < count:
        story = Story(r)
        told = [story.sentence() for _ in range(r.randint(6, 16))]
        out += ["\n" + told[0][1:], *told[1:]]
    return out[:count]
