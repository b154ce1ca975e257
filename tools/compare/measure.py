"""Differences between an endpoint's log-probabilities and ours, token by token, and where they begin.

A difference is theirs minus ours, in nat. Positions count from 0, the prompt's first token, which has no log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.compare.names import Names
from tools.compare.prompts import Prompt
from tools.compare.scoring import Score
from tools.compare.ways import Answer

# of the probability outside the returned tokens, which rounding may make zero or negative
_LEAST = 1e-9


@dataclass
class Result:
    """One prompt's comparison.

    tokens: those that can be compared (all but the first). compared: those whose log-probability the endpoint gave. unaligned: after
    the server's tokens stopped being ours, and so not compared. missing: the rest; missing_first: the first of them, where the
    endpoint was asked for all, because servers write null for what is no number. first: the first token beyond the threshold (or not
    finite); not_finite: tokens at which a log-probability is NaN, or the token's own is minus infinity. worst: the largest
    difference and worst_position where. top1_*: the likeliest token, where the endpoint returned
    others; a disagreement counts only when our likeliest leads the second by more than the threshold. kl_*: divergence of theirs
    from ours over the returned tokens and one bucket for all others, a lower bound of the whole. tokenisation: first token that the
    server reads otherwise. noise_*: our own two dtypes against each other.
    """

    id: str
    tokens: int
    compared: int = 0
    missing: int = 0
    missing_first: int | None = None
    unaligned: int = 0
    first: int | None = None
    first_token: str | None = None
    first_ours: float | None = None
    first_theirs: float | None = None
    worst: float | None = None
    worst_position: int | None = None
    mean_abs: float | None = None
    not_finite: int = 0
    top1_compared: int = 0
    top1_disagreements: int = 0
    top1_first: int | None = None
    kl_positions: int = 0
    kl_mean: float | None = None
    kl_max: float | None = None
    tokenisation: dict[str, Any] | None = None
    noise_mean: float | None = None
    noise_max: float | None = None
    ids: list[int] = field(default_factory=list)
    ours: list[float | None] = field(default_factory=list)
    theirs: list[float | None] = field(default_factory=list)

    @property
    def begins(self) -> int | None:
        """The first position at which anything is beyond the threshold, None when nothing is."""
        tokenisation = self.tokenisation["position"] if self.tokenisation else None
        places = [self.first, self.top1_first, self.missing_first, tokenisation]
        return min((place for place in places if place is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `begins`."""
        return {**asdict(self), "begins": self.begins}


def named_ids(answer: Answer, names: Names) -> list[dict[int, float]]:
    """Per token the other tokens that the endpoint returned, by id; those whose text belongs to no single token are left out."""
    return [
        {token: value for key, value in entry.top.items() if (token := names.resolve(key)) is not None}
        for entry in answer.entries
    ]


def measure(
    prompt: Prompt, answer: Answer, top: Sequence[dict[int, float]], scores: Sequence[Score], names: Names, threshold: float
) -> Result:
    """Compare one answer with our scores (of tokens 1, 2, ...). top: `named_ids` of the answer. threshold: in nat."""
    result = Result(prompt.id, len(prompt.ids) - 1, ids=list(prompt.ids), ours=[None], theirs=[None])
    if answer.departure is not None:
        result.tokenisation = dict(zip(("position", "ours", "theirs"), answer.departure, strict=True))
    differences: list[float] = []
    divergences: list[float] = []
    for position, own in enumerate(scores, 1):
        result.ours.append(own.logprob)
        result.theirs.append(None)
        if position >= answer.same:
            result.unaligned += 1
            continue
        entry = answer.entries[position]
        broken = any(map(math.isnan, top[position].values()))
        if top[position] and not broken:
            _compare_top(result, position, own, top[position], complete=len(top[position]) == len(entry.top), threshold=threshold)
            if math.isfinite(sum(top[position].values())):
                divergences.append(divergence(own.asked, top[position]))
        theirs = math.nan if broken else entry.logprob
        if theirs is None:
            result.missing += 1
            if answer.whole and result.missing_first is None:
                result.missing_first = position
            continue
        result.compared += 1
        difference = theirs - own.logprob
        finite = math.isfinite(difference)
        if finite:
            result.theirs[position] = theirs
            differences.append(abs(difference))
            if result.worst is None or abs(difference) > abs(result.worst):
                result.worst, result.worst_position = difference, position
        else:
            result.not_finite += 1
        if result.first is None and not abs(difference) <= threshold:
            result.first, result.first_token = position, names.text(prompt.ids[position])
            result.first_ours, result.first_theirs = own.logprob, result.theirs[position]
    result.mean_abs = sum(differences) / len(differences) if differences else None
    if divergences:
        result.kl_positions = len(divergences)
        result.kl_mean, result.kl_max = sum(divergences) / len(divergences), max(divergences)
    return result


def _compare_top(result: Result, position: int, own: Score, top: dict[int, float], *, complete: bool, threshold: float) -> None:
    theirs = max(top, key=lambda token: top[token])
    if not complete and theirs != own.best:
        # the likeliest may be among those whose text names no single token
        return
    result.top1_compared += 1
    if theirs != own.best and own.margin > threshold and top.get(own.best, -math.inf) < top[theirs]:
        result.top1_disagreements += 1
        if result.top1_first is None:
            result.top1_first = position


def divergence(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Kullback-Leibler divergence, in nat, of theirs from ours over the tokens of `theirs` and one bucket for all others."""
    total, rest_ours, rest_theirs = 0.0, 1.0, 1.0
    for token, logprob in theirs.items():
        p = math.exp(ours[token])
        total += p * (ours[token] - logprob)
        rest_ours, rest_theirs = rest_ours - p, rest_theirs - math.exp(logprob)
    rest_ours, rest_theirs = max(rest_ours, _LEAST), max(rest_theirs, _LEAST)
    return max(total + rest_ours * math.log(rest_ours / rest_theirs), 0.0)


def add_noise(result: Result, other: Sequence[float]) -> None:
    """Fill in how far our own log-probabilities `other` (of another dtype, of tokens 1, 2, ...) lie from those compared."""
    apart = [abs(a - b) for a, b in zip(result.ours[1:], other, strict=True) if a is not None]
    result.noise_mean, result.noise_max = sum(apart) / len(apart), max(apart)


def summary(results: Sequence[Result], finished: bool) -> dict[str, Any]:
    """Totals over prompts: {prompts, tokens, compared, missing, unaligned, departing, earliest, worst, mean_abs, not_finite,
    top1_compared, top1_disagreements, kl_mean, noise_mean, noise_max, within}.

    within: false when a prompt departs, else true; None (no verdict) when none does, but not all prompts were `finished`, or no
    log-probability was compared.
    """
    compared = sum(r.compared for r in results)
    tokens = sum(r.tokens for r in results)
    worst = max((r.worst for r in results if r.worst is not None), key=abs, default=None)
    departing = [r for r in results if r.begins is not None]
    verdict = True if finished and compared else None

    def mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
        known = [(value, weight) for value, weight in pairs if value is not None]
        weights = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / weights if weights else None

    return {
        "prompts": len(results),
        "tokens": tokens,
        "compared": compared,
        "missing": sum(r.missing for r in results),
        "unaligned": sum(r.unaligned for r in results),
        "departing": len(departing),
        "earliest": min((r.begins for r in departing if r.begins is not None), default=None),
        "worst": worst,
        "mean_abs": mean((r.mean_abs, r.compared - r.not_finite) for r in results),
        "not_finite": sum(r.not_finite for r in results),
        "top1_compared": sum(r.top1_compared for r in results),
        "top1_disagreements": sum(r.top1_disagreements for r in results),
        "kl_mean": mean((r.kl_mean, r.kl_positions) for r in results),
        "noise_mean": mean((r.noise_mean, r.tokens) for r in results),
        "noise_max": max((r.noise_max for r in results if r.noise_max is not None), default=None),
        "within": False if departing else verdict,
    }
