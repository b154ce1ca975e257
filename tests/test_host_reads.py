"""What needs the host is seen with its place; the dispatch of the cuda backend needs nothing; recording is refused where it can not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import v4
from ops.contract import CONTRACTS
from ops.host_reads import HostReads, NotRecordable
from ops.judge import judge
from ops.mutants import MUTANTS
from ops.registry import load_backend
from tests import tiny

load_backend("cuda")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dispatch_on_the_device_reads_nothing_and_is_right(dtype: torch.dtype, seed: int) -> None:
    contract = CONTRACTS["moe_dispatch"]
    fn = contract.impls["cuda"].fn
    left = [m for m in MUTANTS["moe_dispatch"].values() if dtype in m.dtypes]
    for sample in contract.samples(dtype, seed):
        with HostReads() as reads:
            fn(*sample.args, **sample.kwargs)
        assert reads.places == []
        assert judge(contract, fn, sample).ok, sample.name
        left = [m for m in left if judge(contract, m.make(fn), sample).ok]
    assert left == []


def test_a_backend_without_recorder_is_named() -> None:
    model = v4.load(tiny.checkpoint("window-only"))
    with pytest.raises(ValueError, match="backend 'cpu' does not record steps"):
        model.generate([0, 1], 3, recorded=True)


class Eager:
    """Records nothing: the work itself is what it replays."""

    def staging(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def settled(self) -> None:
        pass

    def upload(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host)

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return work


def test_generation_through_a_recorder_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the completion of entries of both kinds, greedy and drawn; drafts are refused."""
    model = v4.load(tiny.checkpoint("flash"))
    monkeypatch.setattr("v4.api.recorder", lambda backend: Eager())
    ids = tiny.tokens(121)
    for drawn in ({}, {"temperature": 0.8, "top_k": 20, "seed": 3}):
        right = model.generate(ids, 12, stop=[], **drawn)
        found = model.generate(ids, 12, stop=[], recorded=True, **drawn)
        assert found.tokens == right.tokens and found.steps == right.steps == 11
    with pytest.raises(ValueError, match="recorded steps are single tokens"):
        model.generate(ids, 4, recorded=True, speculative=True)
