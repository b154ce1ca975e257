"""What must not change a result: how a sequence is cut into calls, what else is in the batch, drafts, and what was written
and undone.

Mode "invariant" (batch_invariant=True) is held bitwise; the default mode within the ops' error bounds propagated to the logits
(tests/tolerance.py) and within the allowance of the comparison with transformers, whichever is less, with inputs that stay
clear of near-tied choices (asserted in test_transformers)."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import v4
from tests import clear, tiny
from tests.tolerance import logit_tolerance
from v4.cache import SLACK
from v4.generate import Drafter

MODES = ("invariant", "default")
NAMES = ("flash", "csa-first")
CASES = list(itertools.product(MODES, NAMES))
LENGTH = {"invariant": 200, "default": tiny.LENGTH}
"""Tokens per sequence; bitwise mode computes token by token, and slowly. HCA completes an entry in both."""
SEQUENCES = 4
few = settings(max_examples=4, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


@functools.cache
def loaded(mode: str, name: str) -> v4.LoadedModel:
    return v4.load(
        tiny.checkpoint(name), backend="cpu", dtype=torch.float32, numerics="exact", batch_invariant=mode == "invariant"
    )


def ids_of(name: str, number: int = 0, count: int = tiny.LENGTH) -> list[int]:
    return list(clear.prompts(name)[number][:count])


@functools.cache
def one_shot(mode: str, name: str, number: int = 0) -> Tensor:
    """Logits of a prompt computed alone in one call; what comes later changes nothing, so its first rows are those of a
    prefix."""
    return loaded(mode, name).logits(ids_of(name, number, LENGTH[mode]))


@functools.cache
def tolerance(name: str) -> float:
    """The ops' bounds propagated to the logits, in units of the largest; never more than what parity with transformers allows."""
    return min(logit_tolerance(loaded("default", name), ids_of(name)), 2e-5)


def assert_same(found: Tensor, golden: Tensor, mode: str, name: str) -> None:
    """Bitwise in mode "invariant", within the propagated bounds otherwise."""
    assert found.shape == golden.shape
    if mode == "invariant":
        differing = int((found != golden).any(-1).sum())
        assert torch.equal(found, golden), (
            f"{differing} of {len(golden)} rows differ, by up to {float((found - golden).abs().max())}"
        )
    else:
        worst = float((found - golden).abs().max() / golden.abs().max())
        assert worst <= tolerance(name), f"differs by {worst:.3g} of scale, allowed {tolerance(name):.3g}"


# ---- chunks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "name"), CASES)
@few
@given(cuts=st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=12))
def test_any_chunking_is_one_shot(mode: str, name: str, cuts: set[float]) -> None:
    count = LENGTH[mode]
    edges = sorted({0, count, *(int(cut * count) for cut in cuts)})
    found = loaded(mode, name).logits(ids_of(name, 0, count), chunks=[b - a for a, b in itertools.pairwise(edges)])
    assert_same(found, one_shot(mode, name), mode, name)


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_600_tokens_decoded_are_their_prefill(mode: str, name: str) -> None:
    ids, model = clear.prompts(name, 1, 600)[0], loaded(mode, name)
    assert_same(model.logits(ids, chunks=[1] * 600), model.logits(ids), mode, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mode", "name"), [("invariant", "flash"), ("default", "no-choices")])
def test_10000_tokens_decoded_are_their_prefill(mode: str, name: str) -> None:
    """Bitwise where experts and entries are chosen; within the bound on a model without choices, since among some hundred
    thousand decisions a few are near ties, which rounding may turn in the default mode."""
    ids = tiny.tokens(10_000)
    model = loaded(mode, name)
    assert_same(model.logits(ids, chunks=[1] * 10_000), model.logits(ids, chunks=[1000] * 10), mode, name)


# ---- batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "name"), CASES)
@few
@given(lengths=st.lists(st.floats(0, 1), min_size=1, max_size=SEQUENCES - 1), position=st.integers(0, SEQUENCES - 1))
def test_a_batch_is_its_singles_at_any_position(mode: str, name: str, lengths: list[float], position: int) -> None:
    counts = [max(1, int(x * LENGTH[mode])) for x in lengths]
    batch = [(1 + i, n) for i, n in enumerate(counts)]
    batch.insert(min(position, len(batch)), (0, LENGTH[mode]))
    found = loaded(mode, name).logits_batch([ids_of(name, i, n) for i, n in batch])
    for (i, n), logits in zip(batch, found, strict=True):
        assert_same(logits, one_shot(mode, name, i)[:n], mode, name)


@pytest.mark.parametrize(("mode", "name"), CASES)
@few
@given(seed=st.integers(0, 2**20))
def test_sequences_that_prefill_and_decode_side_by_side_are_their_singles(mode: str, name: str, seed: int) -> None:
    draw = random.Random(seed)
    numbers = draw.sample(range(SEQUENCES), 3)
    batch = [ids_of(name, i, draw.randint(40, LENGTH[mode])) for i in numbers]
    runner = loaded(mode, name).runner
    cache = runner.session(max_tokens=LENGTH[mode], max_sequences=3, max_chunk=LENGTH[mode]).cache
    sequences = [cache.new_sequence() for _ in batch]
    rows: list[list[Tensor]] = [[] for _ in batch]
    while any(s.length < len(ids) for s, ids in zip(sequences, batch, strict=True)):
        counts = [draw.choice([0, 1, 1, draw.randint(2, 90)]) for _ in batch]
        parts = [ids[s.length : s.length + n] for s, ids, n in zip(sequences, batch, counts, strict=True)]
        if not any(parts):
            continue
        streams = runner.forward(cache, sequences, parts)
        for i, part in enumerate(streams.split([len(p) for p in parts])):
            rows[i].append(part)
    for i, ids, found in zip(numbers, batch, rows, strict=True):
        assert_same(runner.logits(torch.cat(found)), one_shot(mode, name, i)[: len(ids)], mode, name)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_given_back_and_taken_again_leave_nothing_behind(mode: str) -> None:
    model = loaded(mode, "flash")
    ids = ids_of("flash", 0, LENGTH[mode])
    cache = model.runner.session(max_tokens=len(ids), max_sequences=2, max_chunk=len(ids)).cache
    first = cache.new_sequence()
    model.runner.forward(cache, [first], [ids_of("flash", 1, len(ids))])
    cache.free(first)
    again = cache.new_sequence()
    rows = [model.runner.forward(cache, [again], [part]) for part in (ids[:100], ids[100:])]
    assert_same(model.runner.logits(torch.cat(rows)), one_shot(mode, "flash"), mode, "flash")


# ---- rollback ----------------------------------------------------------------------------------------------------------------


def run_with_detours(model: v4.LoadedModel, ids: Sequence[int], detours: dict[int, int]) -> Tensor:
    """Logits of `ids` where, before the token at each key, that many wrong tokens are stored and rolled back."""
    cache = model.runner.session(max_tokens=len(ids) + SLACK, max_chunk=len(ids)).cache
    sequence = cache.new_sequence()
    rows = []
    edges = sorted({0, *detours, len(ids)})
    for start, end in itertools.pairwise(edges):
        if wrong := detours.get(start, 0):
            model.runner.forward(cache, [sequence], [tiny.tokens(wrong, seed=start + 1)])
            sequence.rollback(wrong)
        rows.append(model.runner.forward(cache, [sequence], [ids[start:end]]))
    return model.runner.logits(torch.cat(rows))


@pytest.mark.parametrize(("mode", "name"), CASES)
@few
@given(detours=st.dictionaries(st.integers(1, min(LENGTH.values()) - 1), st.integers(1, SLACK), min_size=1, max_size=5))
def test_rolled_back_is_never_written(mode: str, name: str, detours: dict[int, int]) -> None:
    found = run_with_detours(loaded(mode, name), ids_of(name, 0, LENGTH[mode]), detours)
    assert_same(found, one_shot(mode, name), mode, name)


@pytest.mark.parametrize("mode", MODES)
def test_rollback_across_completed_entries(mode: str) -> None:
    """The wrong tokens complete CSA entries, the HCA entries at 128 and 256, and overwrite the states both are pooled from."""
    detours = {49: 64, 126: 4, 127: 1, 128: 64, 129: 5, 131: 1, 192: 64}
    if mode == "default":
        detours |= {200: 64, 255: 3, 256: 40}
    found = run_with_detours(loaded(mode, "pro"), ids_of("pro", 0, LENGTH[mode]), detours)
    assert_same(found, one_shot(mode, "pro"), mode, "pro")


def test_a_long_chunk_after_a_rollback() -> None:
    """Blocks of the tokens that were undone and of the chunk's own live range are needed at the same time."""
    found = run_with_detours(loaded("default", "flash"), ids_of("flash"), {49: SLACK})
    assert_same(found, one_shot("default", "flash"), "default", "flash")


# ---- speculation -------------------------------------------------------------------------------------------------------------


@functools.cache
def greedy(mode: str, count: int = 40) -> tuple[int, ...]:
    """Greedy continuation; asserts that no step is decided by less than the tolerance, so that every correct run agrees."""
    model, ids = loaded(mode, "flash"), ids_of("flash", count=150)
    found = model.generate(ids, count, stop=()).tokens
    assert len(found) == count
    logits = model.logits(ids + found)[len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == found
    best = logits.topk(2, dim=-1).values
    assert float((best[:, 0] - best[:, 1]).min() / logits.abs().max()) > 2 * tolerance("flash")
    return tuple(found)


@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("mode", MODES)
def test_speculative_decoding_is_greedy(mode: str, drafts: int) -> None:
    found = loaded(mode, "flash").generate(ids_of("flash", count=150), 40, speculative=drafts, stop=())
    assert tuple(found.tokens) == greedy(mode)
    assert found.drafted > 0


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_speculative_decoding_is_greedy_whatever_is_drafted(mode: str, right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights hardly ever confirm a draft: here drafts are right with a given probability."""
    ids, draw = ids_of("flash", count=150), random.Random(5)
    text = [*ids, *greedy(mode)]

    def propose(self: Drafter, streams_1nD: Tensor) -> list[int]:
        known = self.sequence.length + 1
        truth = [text[i] if i < len(text) else 7 for i in range(known, known + self.count)]
        return [t if draw.random() < right else (t + 1) % 512 for t in truth]

    monkeypatch.setattr(Drafter, "propose", propose)
    found = loaded(mode, "flash").generate(ids, 40, speculative=4, stop=())
    assert tuple(found.tokens) == greedy(mode)
    if right == 1.0:
        assert found.acceptance > 0.9
        assert found.steps <= 40 // 5 + 1
    if right == 0.0:
        assert found.accepted == 0


@pytest.mark.parametrize("mode", MODES)
def test_speculative_decoding_stops_where_greedy_stops(mode: str) -> None:
    stop = greedy(mode)[20]
    expected = list(greedy(mode)[: greedy(mode).index(stop) + 1])
    for drafts in (0, 3):
        found = loaded(mode, "flash").generate(ids_of("flash", count=150), 40, speculative=drafts, stop=[stop])
        assert found.tokens == expected
        assert found.stopped == "stop"
