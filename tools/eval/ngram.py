"""An interpolated 5-gram model over token ids with Witten-Bell smoothing: the yardstick of the perplexity evaluation.

P(w | h) = (c(hw) + n(h) P(w | h')) / (c(h) + n(h)), h' the history without its oldest token, n(h) the number of different
tokens seen after h; the shortest history falls back to the uniform distribution. Source: Witten and Bell, 1991.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 5


class Ngram:
    """Counts of all orders up to `order`; `vocabulary` is the number of token ids."""

    def __init__(self, vocabulary: int, order: int = ORDER) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.after: Counter[tuple[int, ...]] = Counter()
        self.different: Counter[tuple[int, ...]] = Counter()

    def learn(self, ids: Sequence[int]) -> None:
        """Count one text."""
        for end in range(1, len(ids) + 1):
            for n in range(1, min(self.order, end) + 1):
                gram = tuple(ids[end - n : end])
                self.after[gram[:-1]] += 1
                if not self.counts[gram]:
                    self.different[gram[:-1]] += 1
                self.counts[gram] += 1

    def probability(self, history: Sequence[int], token: int) -> float:
        """P(token | the last tokens of history)."""
        p = 1 / self.vocabulary
        for n in range(min(self.order - 1, len(history)) + 1):
            h = tuple(history[len(history) - n :])
            if total := self.after[h]:
                kinds = self.different[h]
                p = (self.counts[(*h, token)] + kinds * p) / (total + kinds)
        return p

    def bits(self, ids: Sequence[int], start: int = 1) -> float:
        """Bits of the tokens from `start` on, each given all before it."""
        return -sum(math.log2(self.probability(ids[max(0, i - self.order + 1) : i], ids[i])) for i in range(start, len(ids)))
