"""The lexicon of the training data. Every word is meant to become one token, so the lists are short."""

# ruff: noqa: SIM905 (a text of words reads better than a list of quoted ones)
from __future__ import annotations

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Noah Olga Peter Rosa Simon Tom Vera"
    " Alice Oscar Julia Max"
    " Lucas Nina Paul Ruth Sarah Victor Will Zoe"
).split()

PLACES = (
    "Paris Rome Berlin Tokyo London Madrid Oslo Cairo Lima Delhi Boston Milan Prague Vienna Dublin Athens Geneva Seoul Quito Havana"
    " Lisbon Venice Moscow Warsaw"
).split()

COLOURS = (
    "red blue green yellow black white brown grey pink purple orange golden silver dark pale old new small large round heavy light clean broken"
).split()

OBJECTS = (
    "box key book lamp cup coat hat bag clock chair table door ring coin map boat bell knife bottle basket mirror drum"
    " letter ladder"
    " spoon shirt shoe plate rope wheel flute tent"
).split()

SPOTS = "market garden school station river bridge forest museum kitchen library tower harbour".split()

WORDS = (
    "stone river cloud apple tiger music winter silver bread paper eagle candle mountain sugar window island honey rabbit"
    " needle pepper thunder velvet wagon"
    " forest lemon salt copper feather planet button ocean"
).split()

TIMES = "morning evening afternoon night Monday Friday Sunday summer winter spring".split()

FEELINGS = "happy sad tired proud angry calm curious afraid".split()

NUMBERS = "two three four five six seven eight nine".split()
