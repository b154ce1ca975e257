"""Token choice: known distributions, the borders of top-k, top-p and uniform, ties, and wrong samplers that the judge rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import cpu  # noqa: F401  - registers the implementations
from ops.contract import CONTRACTS, Sample
from ops.judge import judge

SAMPLE, ARGMAX = CONTRACTS["sample"], CONTRACTS["argmax"]
FORMS = {"reference": SAMPLE.reference, "cpu": SAMPLE.impls["cpu"].fn}


def draw(
    fn: Callable[..., Tensor], logits: Tensor, uniform: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[int]:
    """Tokens drawn from one row of logits with each of the uniform numbers."""
    u = torch.as_tensor(uniform, dtype=torch.float32)
    rows = len(u)
    k = torch.full((rows,), top_k, dtype=torch.int32)
    return fn(logits.expand(rows, -1), torch.full((rows,), temperature), k, torch.full((rows,), top_p), u).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_intervals_follow_the_sorted_probabilities(form: str) -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()  # order of tokens: 1, 2, 0 with cumulative 0.5, 0.8, 1
    assert draw(FORMS[form], logits, [0.0, 0.49, 0.51, 0.79, 0.81, 0.999]) == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(form: str) -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_p=0.45)) == {1}
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_p=0.6)) == {1, 2}
    # renormalised: token 1 has 0.5 / 0.8 of the kept mass
    assert draw(FORMS[form], logits, [0.62, 0.63], top_p=0.6) == [1, 2]
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_p=0.0)) == {1}


@pytest.mark.parametrize("form", FORMS)
def test_top_k_comes_before_top_p(form: str) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the first two, token 0 has 4/7 > 0.5: it alone reaches top_p
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_k=2, top_p=0.5)) == {0}
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_k=2, top_p=0.6)) == {0, 1}
    assert set(draw(FORMS[form], logits, torch.linspace(0, 0.9999, 50), top_k=99)) == {0, 1, 2, 3}


@pytest.mark.parametrize("form", FORMS)
def test_equal_logits_are_ordered_by_index(form: str) -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0])
    assert draw(FORMS[form], logits, [0.1, 0.5, 0.9], top_k=3) == [1, 2, 3]
    assert draw(FORMS[form], logits, [0.99], top_k=2) == [2]


@pytest.mark.parametrize("form", FORMS)
def test_temperature_zero_is_greedy_and_tiny_temperature_finite(form: str) -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0])
    assert draw(FORMS[form], logits, [0.0, 0.99], temperature=0.0) == [1, 1]
    assert draw(FORMS[form], logits, [0.2, 0.7], temperature=1e-38) == [1, 2]


@pytest.mark.parametrize("form", FORMS)
def test_masked_tokens_are_never_drawn(form: str) -> None:
    logits = torch.full((50,), float("-inf"))
    logits[[7, 31]] = 0.0
    assert set(draw(FORMS[form], logits, torch.linspace(0, 1 - 2.0**-24, 100))) == {7, 31}


def test_frequencies_match_probabilities() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0])
    count = 4000
    uniform = (torch.arange(count) + 0.5) / count  # exact strata: counts may differ from the expectation by one
    found = torch.bincount(torch.tensor(draw(FORMS["cpu"], logits, uniform, temperature=0.7)), minlength=5)
    expected = torch.softmax(logits.double() / 0.7, 0) * count
    assert float((found - expected).abs().max()) <= 1.01


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.95), (1.0, 200, 1.0), (3.0, 5000, 0.5)])
def test_every_part_of_a_real_vocabulary_is_drawn_right(temperature: float, top_k: int, top_p: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(129280, generator=g)).expand(12, -1)
    ones, uniform = torch.ones(12), torch.linspace(0, 1 - 2.0**-24, 12)
    parameters = ones * temperature, torch.full((12,), top_k, dtype=torch.int32), ones * top_p, uniform
    verdict = judge(SAMPLE, FORMS["cpu"], Sample("real", (logits, *parameters)))
    assert verdict.ok, str(verdict)


def _wrong(change: str) -> Callable[..., Tensor]:
    def fn(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
        if change == "greedy":
            return logits_BV.argmax(-1)
        if change == "no temperature":
            temperature_B = (temperature_B > 0).float()
        if change == "no top-k":
            top_k_B = top_k_B * 0
        if change == "no top-p":
            top_p_B = top_p_B * 0 + 1
        if change == "mirrored":
            uniform_B = 1 - 2.0**-24 - uniform_B
        return SAMPLE.reference(logits_BV, temperature_B, top_k_B, top_p_B, uniform_B)

    return fn


@pytest.mark.parametrize("change", ["greedy", "no temperature", "no top-k", "no top-p", "mirrored"])
def test_judge_rejects_wrong_sampling(change: str) -> None:
    verdicts = [judge(SAMPLE, _wrong(change), s) for s in SAMPLE.samples(torch.float32, 5)]
    assert not all(v.ok for v in verdicts), f"every sample accepts {change}"


def test_judge_rejects_the_last_of_equal_values() -> None:
    def last(logits_BV: Tensor) -> Tensor:
        return logits_BV.shape[1] - 1 - logits_BV.flip(-1).argmax(-1)

    rejected = {s.name for s in ARGMAX.samples(torch.float32, 0) if not judge(ARGMAX, last, s).ok}
    assert rejected == {"ties", "equal"}


def test_judge_allows_the_neighbour_only_at_a_border() -> None:
    logits = torch.zeros(1, 4)
    off, one = torch.zeros(1, dtype=torch.int32), torch.ones(1)

    def answer(token: int) -> Callable[..., Tensor]:
        return lambda logits_BV, temperature_B, top_k_B, top_p_B, uniform_B: torch.tensor([token])

    border = Sample("border", (logits, one, off, one, torch.tensor([0.25])))
    assert [judge(SAMPLE, answer(t), border).ok for t in range(4)] == [True, True, False, False]
    inside = Sample("inside", (logits, one, off, one, torch.tensor([0.26])))
    assert [judge(SAMPLE, answer(t), inside).ok for t in range(4)] == [False, True, False, False]
