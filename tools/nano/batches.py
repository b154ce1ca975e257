"""Batches of token ids, each made from its own seed: any batch can be made again, by any process, in any order.

B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.nano.documents import Document, copying, counting, own_texts, recall, story, tool_call
from tools.nano.tokenizer import SPECIAL
from v4.prompt_texts import PromptTexts
from v4.tokenizer import EOS, Tokenizer

_STRINGS = "|".join(map(re.escape, SPECIAL))
_PARTS = re.compile(rf"{_STRINGS}| ?[0-9]| ?[A-Za-z]+| ?(?:(?!{_STRINGS})[^\sA-Za-z0-9])+|\n+|\s")
_SHORTEST_RECALL, _SHORTEST_TOOL = 120, 800


class Encoder:
    """Encodes ASCII text and special strings word by word, remembering every word: equal to the tokenizer, and much faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`."""
        out: list[int] = []
        for word in _PARTS.findall(text):
            found = self._known.get(word)
            if found is None:
                found = self._known[word] = self._tokenizer.encode(word)
            out += found
        return out

    def document(self, document: Document) -> tuple[list[int], list[float]]:
        """Ids and loss weights of a document, piece by piece."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in document:
            found = self(text)
            ids += found
            weights += [weight] * len(found)
        return ids, weights


def _fitting_recall(r: Random, encoder: Encoder, room: int) -> tuple[list[int], list[float]]:
    target = room
    while True:
        ids, weights = encoder.document(recall(r, target))
        if len(ids) <= room:
            return ids, weights
        target -= max(8, len(ids) - room)


def _part(r: Random, encoder: Encoder, texts: PromptTexts, room: int) -> tuple[list[int], list[float]]:
    pick = r.random()
    if pick < 0.66 and room >= _SHORTEST_RECALL:
        return _fitting_recall(r, encoder, room if r.random() < 0.8 else r.randint(_SHORTEST_RECALL, room))
    if pick > 0.82 and room >= _SHORTEST_TOOL:
        return encoder.document(tool_call(r, texts))
    if 0.78 < pick <= 0.84:
        return encoder.document(copying(r))
    if 0.84 < pick <= 0.9:
        return encoder.document(counting(r))
    return encoder.document(story(r, r.randint(60, min(room + 60, 800))))


def row(r: Random, encoder: Encoder, texts: PromptTexts, length: int) -> tuple[list[int], list[float]]:
    """Ids and weights of one row of exactly `length` tokens: whole documents, the last one cut."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        new_ids, new_weights = _part(r, encoder, texts, length - len(ids))
        ids += new_ids
        weights += new_weights
    return ids[:length], weights[:length]


class Batch(NamedTuple):
    """ids int64 [B, T], and the loss weight of each token fp32 [B, T]."""

    ids_BT: Tensor
    weights_BT: Tensor


class Plan(NamedTuple):
    """Rows and length of one step's batch."""

    rows: int
    length: int


class Batches(Dataset[Batch]):
    """Batch number i, made from (seed, i) alone; `plans[i]` gives its size."""

    def __init__(self, tokenizer: str, plans: list[Plan], seed: int) -> None:
        self.tokenizer, self.plans, self.seed = tokenizer, plans, seed
        self._encoder: Encoder | None = None
        self._texts: PromptTexts | None = None

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Batch:
        if self._encoder is None or self._texts is None:
            self._encoder, self._texts = Encoder(Tokenizer(self.tokenizer)), own_texts()
        rows, length = self.plans[index]
        made = [row(Random(f"{self.seed}:{index}:{n}"), self._encoder, self._texts, length) for n in range(rows)]
        ids = torch.from_numpy(np.array([m[0] for m in made], dtype=np.int64))
        return Batch(ids, torch.from_numpy(np.array([m[1] for m in made], dtype=np.float32)))


def stream(batches: Batches, start: int, workers: int) -> Iterator[Batch]:
    """Batches from number `start` on, in order, made by `workers` processes (0: by this one)."""
    rest = torch.utils.data.Subset(batches, range(start, len(batches)))
    yield from DataLoader(
        rest, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=torch.accelerator.is_available()
    )


def perplexity_text(seed: int, tokens: int) -> str:
    """Held-out story text of about `tokens` tokens, from a seed that no batch uses."""
    return "".join(piece.text for piece in story(Random(f"held-out:{seed}"), tokens)[1:]) + EOS
