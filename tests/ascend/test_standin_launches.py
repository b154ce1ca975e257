"""One decode step of a layer with Flash's widths on the pretended device: vendor kernels per layer kind, and nothing for which the host waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from backends.ascend.prepare import prepare
from tests.ascend.bound import binding_of
from tests.ascend.layer import KINDS, config_of, fill
from tools.npu_standin.calls import Record, recording
from tools.npu_standin.install import StandIn
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

pytestmark = [pytest.mark.standin, pytest.mark.wheel, pytest.mark.device]

STORED, STEPS = 2085, 3
UPLOAD = "copy to device"
PER_STEP = ("custom::npu_sparse_attn_sharedkv_metadata", "cann_ops_transformer.lightning_indexer_metadata")
"""Vendor kernels that prepare a step, once for all layers of a kind."""

BLOCK = {"hc": {"910b": 2, "910_93": 6, "950": 6}, "norms and ropes": 8, "experts": 6, "wo_a": 1, "attention": 1}
OWN = {
    "SWA": {"910b": 1, "910_93": 1, "950": 1},
    "CSA": {"910b": 7, "910_93": 7, "950": 7},
    "HCA": {"910b": 2, "910_93": 2, "950": 2},
}
"""Vendor kernels of a layer: of every kind, and beside them (cache writes, compressors, the indexer's rope and choice)."""


def one_step(kind: str, layers: int, standin: StandIn) -> Record:
    """The last of STEPS decode steps of a model of `layers` equal layers, bf16."""
    config = config_of("flash", KINDS[kind], hashed=False)
    config = replace(config, num_hidden_layers=layers, compress_ratios=(KINDS[kind],) * layers)
    model = Model(Settings(config, binding_of(standin.chip.family, torch.bfloat16).ops, torch.bfloat16), mtp=False)
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
def test_a_decode_step(kind: str, standin: StandIn) -> None:
    soc = standin.chip.family
    one, two = (one_step(kind, layers, standin) for layers in (1, 2))
    assert set(one.waits) == set(two.waits) == {UPLOAD}, (one.waits, two.waits)
    assert one.waits[UPLOAD] == two.waits[UPLOAD], "a second layer copies what the first has copied"
    layer: Counter[str] = two.launches("vendor") - one.launches("vendor")
    assert not set(layer) & set(PER_STEP), "a second layer prepares what the first has prepared"
    expected = sum(v[soc] if isinstance(v, dict) else v for v in BLOCK.values()) + OWN[kind][soc]
    assert layer.total() == expected, dict(layer)
