"""Decode steps as CUDA graphs: the same tokens as call by call, on a device."""

from __future__ import annotations

import pytest
import torch

from backends.cuda.graphs import replayed
from tests import tiny
from tests.test_replay import tokens
from v4.api import load
from v4.runner import Runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_graphs_give_the_tokens_of_single_calls() -> None:
    # FP4 experts: those kept in bf16 read their expert numbers on the host
    model = load(tiny.checkpoint("flash"), backend="cuda", numerics="stored", mtp=False).runner.model
    assert tokens(Runner(model, replayed), 200) == tokens(Runner(model), 200)
