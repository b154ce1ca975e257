"""Single layers with the real widths of Flash and Pro: every call judged, what falls to plain torch is the list below, streams near the CPU's."""

from __future__ import annotations

import pytest
import torch

from backends.ascend.prepare import prepare
from ops.registry import bind
from tests.ascend.bound import binding_of
from tests.ascend.layer import KINDS, config_of, run

JUDGED = frozenset(
    ("sparse_attention", "compress", "index_topk", "hc_pre", "hc_post", "gate_topk", "gate_hash", "moe_mlp", "clamped_swiglu", "rope",
     "q_norm_rope", "rms_norm", "cache_insert")
)  # fmt: skip
PLAIN = {"910_93": {"linear"}, "950": {"linear"}, "910b": {"linear", "hc_pre"}}
"""Ops of a bf16 layer that plain torch serves: products of torch are the vendor's, and A2 has no documented pieces of hc_pre."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flash", pytest.param("pro", marks=pytest.mark.slow)])
def test_layer(name: str, kind: str, soc: str, device: torch.device) -> None:
    config = config_of(name, KINDS[kind], hashed=kind == "SWA")
    call = {"stored": 4 * config.index_topk + 37, "counts": [1, 3]}
    host = device.type == "cpu"
    found, seen = run(config, binding_of(soc, torch.bfloat16), prepare, device, judged=JUDGED if host else frozenset(), **call)  # type: ignore[arg-type]
    wrong = [str(v) for v in seen.verdicts if not v.ok]
    assert not wrong, "\n".join(wrong)
    assert seen.verdicts or not host
    fallen = {op for op, labels in seen.labels.items() if any(label.startswith(("plain", "composed")) for label in labels)}
    assert fallen == PLAIN[soc], seen.labels
    expected, _ = run(config, bind(("cpu",), dtype=torch.bfloat16), None, torch.device("cpu"), **call)  # type: ignore[arg-type]
    for y, g in zip(found, expected, strict=True):
        # two bf16 evaluations of one layer: a few roundings of 2^-8 apart
        assert float((y - g).norm() / g.norm()) < 0.02
