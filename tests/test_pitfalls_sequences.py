"""Faults in how a sequence is fed, each planted in a small model: what it is cut into, what is taken back, what else is in the batch.

Source: specification section 13 and Ascend operator notes, section 10 (lessons); tests/pitfalls.yaml says which test stands for which report.
The golden values are the model's own in one call, which tests/test_transformers.py holds against independent code. Prompts are clear of
near ties, so that rounding turns no choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import v4
from ops import paged
from ops.contract import CONTRACTS
from ops.mutants import MUTANTS
from tests import clear, tiny
from v4.cache import Cache, Sequence

ALLOWED, FIRM = 2e-5, 10
"""Error in units of the largest logit, and how far beyond it a fault must lie."""
PROMPTS = (3, 4, 5, 127, 128, 129)
STEPS = 9
"""Single steps behind a prompt: enough to complete two entries of CSA."""
NAMES = ("flash", "pro")
Op = Callable[..., Any]
Wrap = Callable[[Op], Op]


@functools.cache
def model(name: str) -> v4.LoadedModel:
    return v4.load(tiny.checkpoint(name), backend="cpu", dtype=torch.float32, numerics="exact")


@functools.cache
def ids_of(name: str) -> list[int]:
    return list(clear.prompts(name, 1, 150)[0])


@functools.cache
def golden(name: str) -> Tensor:
    return model(name).logits(ids_of(name))


def error(found: Tensor, name: str, first: int = 0) -> float:
    expected = golden(name)[first : first + len(found)]
    return float((found - expected).abs().max() / expected.abs().max()) if bool(torch.isfinite(found).all()) else float("inf")


def plant(patch: pytest.MonkeyPatch, name: str, op: str, wrap: Wrap) -> None:
    ops = model(name).binding.ops
    patch.setattr(ops, op, wrap(getattr(ops, op)))


def mutant(op: str, name: str) -> Wrap:
    return MUTANTS[op][name].make


def in_single_steps(wrap: Wrap) -> Wrap:
    """The fault in calls of one token only: prefill stays right."""

    def wrapped(op: Op) -> Op:
        wrong = wrap(op)
        return lambda x, *args, **kwargs: (wrong if len(x) == 1 else op)(x, *args, **kwargs)

    return wrapped


def in_chunks(wrap: Wrap) -> Wrap:
    """The fault in calls of several tokens only."""

    def wrapped(op: Op) -> Op:
        wrong = wrap(op)
        return lambda x, *args, **kwargs: (wrong if len(x) > 1 else op)(x, *args, **kwargs)

    return wrapped


# ---- prompts around the end of an entry --------------------------------------------------------------------------------------


def state_not_kept(compress: Op) -> Op:
    """The call's tokens do not enter the state."""

    def call(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, state: Tensor, *rest: Any, **kw: Any) -> Tensor:
        return compress(x, wkv, wgate, ape, norm, cos, sin, state.clone(), *rest, **kw)

    return call


AT_THE_PROMPT: dict[str, tuple[tuple[str, Wrap], ...]] = {
    "state_of_the_prompt_lost": (("compress", in_chunks(state_not_kept)),),
    "overlap_lost_in_steps": (("compress", in_single_steps(mutant("compress", "overlap_lost"))),),
    "ape_by_place_in_the_call": (("compress", in_single_steps(mutant("compress", "ape_chunk_relative"))),),
    "entry_hidden_from_its_last_token": (
        ("index_topk", in_single_steps(mutant("index_topk", "entry_late"))),
        ("sparse_attention", in_single_steps(mutant("sparse_attention", "entry_late"))),
    ),
    "state_of_steps_lost": (("compress", in_single_steps(state_not_kept)),),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_and_single_steps_are_one_call(prompt: int, name: str) -> None:
    found = model(name).logits(ids_of(name)[: prompt + STEPS], chunks=[prompt, *[1] * STEPS])
    assert error(found, name) <= ALLOWED


@pytest.mark.parametrize("fault", AT_THE_PROMPT)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_fault_behind_a_prompt_is_seen(prompt: int, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op, wrap in AT_THE_PROMPT[fault]:
        plant(monkeypatch, "flash", op, wrap)
    found = model("flash").logits(ids_of("flash")[: prompt + STEPS], chunks=[prompt, *[1] * STEPS])
    assert error(found[:1], "flash") <= ALLOWED
    assert error(found, "flash") > FIRM * ALLOWED


# ---- chunks ------------------------------------------------------------------------------------------------------------------


def run(name: str, calls: list[tuple[int, int]], between: Callable[[Cache, Sequence], None] | None = None) -> Tensor:
    """Logits of the last call of (first, end); a call that begins before the end of the one before it takes tokens back."""
    runner, ids = model(name).runner, ids_of(name)
    cache = runner.session(max_tokens=len(ids), max_chunk=len(ids)).cache
    sequence = cache.new_sequence()
    streams = torch.empty(0)
    for first, end in calls:
        if first < sequence.length:
            sequence.rollback(sequence.length - first)
        if between and sequence.length:
            between(cache, sequence)
        streams = runner.forward(cache, [sequence], [ids[first:end]])
    return runner.logits(streams)


def states_cleared(cache: Cache, sequence: Sequence) -> None:
    for layer in cache.layers:
        for state in (layer.state, layer.index_state):
            if state is not None:
                state.zero_()


def ring_overwritten(attention: Op) -> Op:
    """A window cache that is a ring of `window` rows: the chunk's rows are written over those that its first queries still need."""

    def call(q: Tensor, cache: Tensor, table: Tensor, sink: Tensor, cu: Tensor, start: Tensor, **kwargs: Any) -> Tensor:
        first, window, ring = int(start[0]), kwargs["window"], cache.clone()

        def at(positions: Tensor) -> tuple[Tensor, Tensor]:
            return table[0].long()[positions // cache.shape[1]], positions % cache.shape[1]

        new = torch.arange(max(first, window), max(first + len(q), first, window))
        old = new - window
        kept = old >= max(first - window, 0)
        ring[at(old[kept])] = cache[at(new[kept])]
        return attention(q, ring, table, sink, cu, start, **kwargs)

    return call


CHUNKS = [(0, 61), (61, 150)]


def test_a_prompt_in_chunks_is_one_call() -> None:
    assert error(run("flash", CHUNKS), "flash", 61) <= ALLOWED


def test_state_lost_between_chunks_is_seen() -> None:
    assert error(run("flash", CHUNKS, states_cleared), "flash", 61) > FIRM * ALLOWED


def test_a_ring_overwritten_before_it_is_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "flash", "sparse_attention", ring_overwritten)
    assert error(model("flash").logits(ids_of("flash")[:30]), "flash") <= ALLOWED, "shorter than the window: nothing is overwritten"
    assert error(run("flash", CHUNKS), "flash", 61) > FIRM * ALLOWED


@pytest.mark.parametrize("fault", [("index_topk", "future"), ("sparse_attention", "shared_mask")], ids=":".join)
def test_a_mask_shared_by_the_queries_of_a_call_is_seen(fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In single steps the fault is harmless: only calls of several tokens show it. Attention reads what is chosen, whether it is visible or not."""
    monkeypatch.setattr(model("flash").binding.ops, "sparse_attention", CONTRACTS["sparse_attention"].reference)
    plant(monkeypatch, "flash", fault[0], mutant(*fault))
    assert error(model("flash").logits(ids_of("flash")[:140], chunks=[1] * 140), "flash") <= ALLOWED
    assert error(model("flash").logits(ids_of("flash")), "flash") > FIRM * ALLOWED


# ---- tokens that are taken back ----------------------------------------------------------------------------------------------


def only_last_window_kept(compress: Op) -> Op:
    """Verification of drafts keeps what the newest window needs, as if all drafts were accepted."""

    def call(x: Tensor, *args: Any, ratio: int, **kwargs: Any) -> Tensor:
        state, table, cu, start = args[6:10]
        before = state.clone()
        found = compress(x, *args, ratio=ratio, **kwargs)
        for _, _, p in paged.tokens(cu, start):
            end = int(start[0]) + len(x)
            if p < (end - 1) // ratio * ratio - (ratio if ratio == 4 else 0):
                at = int(table[0, p // state.shape[1]]), p % state.shape[1]
                state[at] = before[at]
        return found

    return call


DRAFTS = [(0, 121), (121, 130), (123, 124), (124, 150)]
"""Nine drafts, across two entries of CSA and one of HCA, of which two are kept."""


def test_drafts_taken_back_leave_nothing() -> None:
    assert error(run("flash", DRAFTS), "flash", 124) <= ALLOWED


def test_a_state_kept_for_the_newest_window_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "flash", "compress", lambda op: lambda x, *a, **k: (only_last_window_kept(op) if len(x) == 9 else op)(x, *a, **k))
    assert error(run("flash", [(0, 121), (121, 130), (130, 150)]), "flash", 130) <= ALLOWED, "where all drafts are accepted it is harmless"
    assert error(run("flash", DRAFTS), "flash", 124) > FIRM * ALLOWED


def test_a_draft_that_is_not_taken_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rollback = Sequence.rollback
    monkeypatch.setattr(Sequence, "rollback", lambda self, tokens: rollback(self, tokens - 1))
    runner, ids = model("flash").runner, ids_of("flash")
    cache = runner.session(max_tokens=len(ids), max_chunk=len(ids)).cache
    sequence = cache.new_sequence()
    runner.forward(cache, [sequence], [ids[:130]])
    sequence.rollback(9)
    found = runner.logits(runner.forward(cache, [sequence], [ids[121:148]]))
    assert error(found, "flash", 121) > FIRM * ALLOWED


# ---- batches -----------------------------------------------------------------------------------------------------------------


def padding_pooled(compress: Op) -> Op:
    """Two tokens of the second sequence count as padding of the first, as if both had been padded to one length."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        *front, cu, start = args
        return compress(x, *front, cu + torch.tensor([0, 2, 0], dtype=cu.dtype), start, **kwargs)

    return call


def test_padding_pooled_into_entries_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of("flash")
    batch = [ids[:5], ids[:10]]
    worst = [error(found, "flash") for found in model("flash").logits_batch(batch)]
    assert max(worst) <= ALLOWED
    plant(monkeypatch, "flash", "compress", padding_pooled)
    worst = [error(found, "flash") for found in model("flash").logits_batch(batch)]
    assert max(worst) > FIRM * ALLOWED
