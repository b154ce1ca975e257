"""Decode steps as CUDA graphs, on a device: bitwise what eager steps give, without a host synchronisation; refused where plain torch reads values."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import graph_checks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_recorded_steps.py shows the rest without one")


@pytest.mark.parametrize("lengths", [(121,), (254, 129, 7)])
@pytest.mark.parametrize("settings", graph_checks.SETTINGS)
def test_recorded_steps_are_eager_steps(settings: str, lengths: tuple[int, ...]) -> None:
    model = graph_checks.load(**graph_checks.SETTINGS[settings])
    assert graph_checks.steps_differ(model, lengths, 12) == []


@pytest.mark.parametrize("settings", graph_checks.SETTINGS)
def test_recorded_text_is_the_same(settings: str) -> None:
    assert graph_checks.texts_differ(graph_checks.load(**graph_checks.SETTINGS[settings]), 200) == []


def test_plain_torch_that_reads_values_is_refused_with_its_place() -> None:
    message = graph_checks.refusal(graph_checks.load(ops={"moe_mlp": "cuda"}))
    assert "backends/cpu/moe.py" in message and "_one_token" in message
