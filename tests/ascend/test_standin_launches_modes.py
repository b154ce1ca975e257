"""One decode step of a quantised layer with Flash's widths on the pretended device: the launches that docs/performance.md shows, counted again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.ascend.prepare import prepare
from tests.ascend.bound import binding_of
from tests.ascend.layer import KINDS, config_of, fill
from tools.ascend_launches import OURS
from tools.npu_standin.calls import Record, recording
from tools.npu_standin.install import StandIn
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

pytestmark = [pytest.mark.standin, pytest.mark.wheel, pytest.mark.device, pytest.mark.slow]

STORED, STEPS = 2173, 3
STORAGE = {"a3": ("int8", "int8"), "950": ("mx", "mx")}
"""Linears and experts of the mode that the published recipe runs on a chip."""


def one_step(kind: str, layers: int, standin: StandIn) -> Record:
    """The last of STEPS decode steps of a model of `layers` equal layers."""
    linears, experts = STORAGE[standin.chip.alias]
    config = replace(
        config_of("flash", KINDS[kind], hashed=False), num_hidden_layers=layers, compress_ratios=(KINDS[kind],) * layers
    )
    ops = binding_of(standin.chip.family, torch.bfloat16).ops
    model = Model(Settings(config, ops, torch.bfloat16, linears=linears, experts=experts), mtp=False)
    fill(model, standin.device)
    prepare(model)
    runner = Runner(model)
    cache = runner.session(max_tokens=STORED + STEPS, max_chunk=1).cache
    sequence = cache.new_sequence()
    cache.fill_synthetic(sequence, STORED)
    for _ in range(STEPS):
        with recording() as record:
            runner.forward(cache, [sequence], [[5]])
    return record


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_decode_step(kind: str, standin: StandIn) -> None:
    if standin.chip.alias not in STORAGE:
        pytest.skip("the published recipe is for A3 and 950")
    one, two = (one_step(kind, layers, standin) for layers in (1, 2))
    assert one.waits == two.waits, "a second layer makes the host wait"
    found = {part: (two.launches(part) - one.launches(part)).total() for part in ("vendor", "aten")}
    if out := os.environ.get("V4_LAUNCHES_OUT"):
        Path(out, f"{standin.chip.alias}_{kind}.json").write_text(json.dumps(found))
    assert found == OURS[standin.chip.alias][kind]
