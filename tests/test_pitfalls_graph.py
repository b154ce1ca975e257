"""Reported mistakes in the graph itself, planted one by one, held against transformers or the published Sinkhorn matrix.

Source: specification section 13; tests/pitfalls.yaml says which test stands for which report. Those among the ten traps of section 16 are in
tests/test_traps.py, whose checks are used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.23")

import torch
from torch import Tensor

from ops.mutants import MUTANTS
from tests import trap_checks as checks
from tests.trap_checks import model
from tests.trap_faults import Plant, in_op
from v4 import rope
from v4.batch import Batch
from v4.model import Model

FIRM = 10
CUTS = [97, 203]


def chunked_logits_equal_transformers() -> float:
    return checks.distance(model().logits(checks.ids(), chunks=CUTS), checks.golden_logits()) / 2e-5


def with_batch(change: Callable[[Batch], Batch]) -> Plant:
    """Another layout of the call than the one built for it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        forward = Model.forward
        patch.setattr(Model, "forward", lambda self, batch, cache: forward(self, change(batch), cache))

    return plant


def plain_theta_for_queries_and_window(batch: Batch) -> Batch:
    """Compressed entries and index keys keep theirs."""
    return replace(batch, rope={**batch.rope, True: batch.rope[False]})


def positions_of_the_call(batch: Batch) -> Batch:
    """Queries and window rows are rotated by their place in the call."""
    at = torch.arange(batch.tokens)
    return replace(batch, rope={kind: rope.rows(model().runner.tables.by_kind[kind], at) for kind in batch.rope})


def without_yarn(patch: pytest.MonkeyPatch) -> None:
    plain = rope.frequencies(replace(model().config, rope_scaling=None), compressed=True)
    patch.setitem(model().runner.tables.by_kind, True, plain)


def amplitude_in_the_scale(attention: Callable[..., Any]) -> Callable[..., Any]:
    def call(q: Tensor, *args: Any, scale: float, ratio: int, **kwargs: Any) -> Tensor:
        return attention(q, *args, scale=scale * (1.2773**2 if ratio else 1.0), ratio=ratio, **kwargs)

    return call


LOGITS = checks.logits_equal_transformers
PITFALLS: dict[str, tuple[Plant, Callable[[], float]]] = {
    "queries_and_window_at_theta_10000": (with_batch(plain_theta_for_queries_and_window), LOGITS),
    "yarn_missing_on_the_compress_table": (without_yarn, LOGITS),
    "amplitude_in_the_softmax_scale": (in_op("sparse_attention", amplitude_in_the_scale), LOGITS),
    "rotated_by_the_place_in_the_call": (with_batch(positions_of_the_call), chunked_logits_equal_transformers),
    "bias_in_the_routing_weights": (in_op("gate_topk", MUTANTS["gate_topk"]["bias_in_weights"].make), LOGITS),
    "twenty_rounds_behind_the_softmax": (in_op("hc_pre", MUTANTS["hc_pre"]["one_round_more"].make), checks.comb_is_the_matrix_of_section_16),
}


@pytest.mark.parametrize("check", [LOGITS, chunked_logits_equal_transformers, checks.comb_is_the_matrix_of_section_16], ids=lambda c: c.__name__)
def test_check(check: Callable[[], float]) -> None:
    assert check() <= 1


@pytest.mark.parametrize("name", PITFALLS)
def test_planted_pitfall_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = PITFALLS[name]
    plant(monkeypatch)
    assert check() > FIRM, f"{name} is planted, and {check.__name__} does not notice"
