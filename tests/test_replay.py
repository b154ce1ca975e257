"""Steps replayed over fixed buffers: the same tokens as call by call, here with a stand-in for the graph that runs the function again.

What a graph of the device adds is tests/cuda/test_graphs.py's, which needs one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from backends.cuda.graphs import MOST, Function, Replayed
from tests import tiny
from v4.api import load
from v4.runner import Runner

CPU = torch.device("cpu")


def again(function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: function(buffers)


def frozen(function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A replay that does not see new inputs."""
    copies = {name: t.clone() for name, t in buffers.items()}
    return lambda: function(copies)


def tokens(runner: Runner, steps: int = 150) -> list[int]:
    cache = runner.session(max_tokens=300).cache
    sequence = cache.new_sequence()
    found = [int(runner.logits(runner.forward(cache, [sequence], [tiny.tokens(70)])[-1:]).argmax())]
    for _ in range(steps):
        found.append(int(runner.logits(runner.forward(cache, [sequence], [[found[-1]]])).argmax()))
    return found


def test_replayed_steps_give_the_same_tokens() -> None:
    model = load(tiny.checkpoint("flash"), mtp=False).runner.model
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device, again))
        return made[-1]

    plain = tokens(Runner(model))
    assert tokens(Runner(model, replayed)) == plain
    # steps that complete no entry, one of ratio 4, and one of both ratios
    assert len(made) == 1 and len(made[0]._held) == 3
    assert tokens(Runner(model, lambda function, device: Replayed(function, device, frozen))) != plain


def test_results_are_left_alone_and_graphs_do_not_pile_up() -> None:
    total = torch.zeros(3)

    def captured(function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            total.copy_(function(buffers).sum())
            return total

        return replay

    run = Replayed(lambda named: named["x"] * 2, CPU, captured)
    first, second = run({"x": torch.ones(1)}), run({"x": torch.full((1,), 5.0)})
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3
    for size in range(1, MOST + 5):
        run({"x": torch.ones(size)})
    assert len(run._held) == MOST


def test_what_is_kept_for_a_cache_does_not_keep_it() -> None:
    runner = Runner(load(tiny.checkpoint("flash"), mtp=False).runner.model, lambda f, device: Replayed(f, device, again))
    cache = runner.session(max_tokens=20).cache
    runner.forward(cache, [cache.new_sequence()], [[5]])
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None and not runner._steps


def test_without_a_device_capturing_fails_loudly() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises((RuntimeError, AssertionError)):
        Replayed(lambda named: named["x"], CPU)({"x": torch.ones(1)})
