"""Our side: log-probabilities of a prompt's own tokens, of the likeliest two, and of the tokens that the endpoint named.

Shapes: T tokens, V vocabulary, R rows whose logits exist at one time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4 import LoadedModel

CHUNK = 2048
ROWS = 256


@dataclass(frozen=True)
class Score:
    """Of one token given those before it: its log-probability, the likeliest token, how far that is above the second, and the
    log-probabilities of the tokens asked for."""

    logprob: float
    best: int
    margin: float
    asked: dict[int, float]


def score(model: LoadedModel, ids: Sequence[int], asked: Sequence[Sequence[int]]) -> list[Score]:
    """Scores of tokens 1 to T - 1 of `ids` [T] (entry i is of token i + 1); `asked[i]`: further ids wanted at token i, any number.

    The logits of R = ROWS tokens exist at a time, so that long prompts with V = 129280 fit. ValueError for ids or a length that
    the model does not take.
    """
    cache = model.runner.session(max_tokens=len(ids), max_chunk=min(CHUNK, len(ids))).cache
    sequence, scores = cache.new_sequence(), []
    for start in range(0, len(ids), CHUNK):
        streams = model.runner.forward(cache, [sequence], [list(ids[start : start + CHUNK])])
        for first in range(0, len(streams), ROWS):
            logprobs_RV = torch.log_softmax(model.runner.logits(streams[first : first + ROWS]).float(), dim=-1)
            two = logprobs_RV.topk(2, dim=-1)
            values, best = two.values.tolist(), two.indices[:, 0].tolist()
            for row, (highest, second) in enumerate(values):
                token = start + first + row + 1
                if token >= len(ids):
                    break
                wanted = [ids[token], *asked[token]]
                if not math.isfinite(second):
                    raise ValueError(
                        f"our own log-probabilities of token {token} are not finite, expected numbers; "
                        "try --dtype float32, and v4 checkpoint verify"
                    )
                found = logprobs_RV[row, torch.tensor(wanted, device=logprobs_RV.device)].tolist()
                scores.append(Score(found[0], best[row], highest - second, dict(zip(wanted, found, strict=True))))
    return scores
