"""What needs the host is seen with its place; generation through replayed steps; recording is refused where it can not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import v4
from backends.cuda.graphs import Function, Replayed
from ops.contract import CONTRACTS
from ops.host_reads import HostReads, NotRecordable
from tests import tiny
from v4.runner import Runner

ON_HOST, X = torch.ones(3), torch.tensor([3.0, 0.0, 2.0])
MIXES: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool(X[0] > 1),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 1],
    "counts": lambda: torch.bincount(X.long()),
    "repeats": lambda: torch.repeat_interleave(X, X.long()),
    "to-device": lambda: ON_HOST.to("meta"),
    "mixed": lambda: torch.empty(3, device="meta").copy_(ON_HOST),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_needs_the_host_is_noted(name: str) -> None:
    with HostReads() as reads:
        MIXES[name]()
    assert len(reads.places) == 1, reads.places


def test_what_does_not_is_not() -> None:
    with HostReads() as reads:
        torch.repeat_interleave(X, 3)
        X[torch.tensor([0, 2])] = 1.5 * X[:2]
        torch.sort(X).values.cumsum(0).argmax()
    assert reads.places == []


def test_the_place_is_the_innermost_line_of_the_project() -> None:
    x, ids = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int32)
    with HostReads() as reads:
        CONTRACTS["moe_dispatch"].impls["cpu"].fn(x, ids, torch.ones(2, 1), num_experts=3)
    assert all(p.startswith("backends/cpu/moe.py:") and "_sorted_rows" in p for p in reads.places)
    assert any("bincount" in p for p in reads.places)
    message = str(NotRecordable([*reads.places, *reads.places]))
    assert message.count("bincount") == 1 and f"at {len(set(reads.places))} places" in message


def test_a_backend_without_recorder_is_named() -> None:
    model = v4.load(tiny.checkpoint("window-only"))
    with pytest.raises(ValueError, match="backend 'cpu' does not record steps"):
        model.generate([0, 1], 3, recorded=True)


def test_generation_through_replayed_steps_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the completion of entries of both kinds, greedy and drawn; drafts are refused."""
    model = v4.load(tiny.checkpoint("flash"))
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device, lambda function, buffers: lambda: function(buffers)))
        return made[-1]

    monkeypatch.setattr("v4.api.replayed_of", lambda backend: replayed)
    ids = tiny.tokens(121)
    for drawn in ({}, {"temperature": 0.8, "top_k": 20, "seed": 3}):
        right = model.generate(ids, 12, stop=[], **drawn)
        found = model.generate(ids, 12, stop=[], recorded=True, **drawn)
        assert found.tokens == right.tokens and found.steps == right.steps == 11
    assert [m.held for m in made] == [3, 3]
    with pytest.raises(ValueError, match="recorded steps are single tokens"):
        model.generate(ids, 4, recorded=True, speculative=True)


def test_steps_of_several_sequences_have_few_shapes() -> None:
    """Every step of eight sequences at different places completes some entries: one shape, and right."""
    model = v4.load(tiny.checkpoint("csa-first")).runner.model
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device, lambda function, buffers: lambda: function(buffers)))
        return made[-1]

    found = []
    for runner in (Runner(model), Runner(model, replayed)):
        cache = runner.session(max_tokens=64, max_sequences=8).cache
        sequences = [cache.new_sequence() for _ in range(8)]
        runner.forward(cache, sequences, [tiny.tokens(20 + 3 * b, seed=b) for b in range(8)])
        found.append(torch.stack([runner.forward(cache, sequences, [[step + b] for b in range(8)]) for step in range(9)]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert made[0].held == 1
