"""Quantised modes on the chips: INT8 on A2, A3 and 950, the hub's FP8 and MXFP4 on 950; which op runs what, judged, and near the CPU."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import v4
from backends.ascend.mx import row_scales
from backends.ascend.prepare import prepare
from backends.ascend.recipes import TARGETS
from ops.registry import bind
from tests.ascend.bound import binding_of
from tests.ascend.layer import KINDS, Seen, config_of, run, watch
from tools.runconfig import named_config
from v4.convert import convert
from v4.make import make

MODES = {"910b": "ascend-a2-w8a8", "910_93": "ascend-a3-w8a8", "950": "ascend-950-mx"}
STORED = {"int8": ("int8", "int8"), "mx": ("mx", "mx")}
PRODUCTS = {"int8": {"linear_int8", "moe_int8", "quant_int8", "rms_norm_quant"}, "mx": {"linear_mx", "moe_mx", "quant_mxfp8", "rms_norm_quant"}}
PLAIN = {
    "ascend-a2-w8a8": {"hc_pre"},
    "ascend-a3-w8a8": set(),
    "ascend-950-mx": set(),
}
"""Ops of a quantised layer that plain torch serves, besides the bf16 product of the indexer's weights, which is the vendor's own."""


@pytest.mark.parametrize("kind", ["CSA", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "CSA")])
@pytest.mark.parametrize("name", ["flash", pytest.param("pro", marks=pytest.mark.slow)])
def test_layer_of_the_chips_mode(name: str, kind: str, soc: str, device: torch.device) -> None:
    mode = TARGETS[MODES[soc]]
    linears, experts = STORED[mode.kind]
    config = config_of(name, KINDS[kind])
    call = {"stored": 4 * config.index_topk + 37, "counts": [1, 3], "linears": linears, "experts": experts}
    # goldens in float64 of Pro's products take minutes; its parts are judged in test_adapters_ops.py
    judged = frozenset(PRODUCTS[mode.kind]) if device.type == "cpu" and name == "flash" else frozenset()
    found, seen = run(config, binding_of(soc, torch.bfloat16), prepare, device, judged=judged, **call)  # type: ignore[arg-type]
    wrong = [str(v) for v in seen.verdicts if not v.ok]
    assert not wrong, "\n".join(wrong)
    assert PRODUCTS[mode.kind] <= set(seen.labels)
    fallen = {op for op, labels in seen.labels.items() if any(label.startswith(("plain", "composed")) for label in labels)}
    assert fallen - {"linear"} == PLAIN[MODES[soc]], dict(seen.labels)
    exact, plain = (
        run(config, bind(("cpu",), dtype=dtype), None, torch.device("cpu"), dtype=dtype, **call)[0]  # type: ignore[arg-type]
        for dtype in (torch.float32, torch.bfloat16)
    )
    for y, p, g in zip(found, plain, exact, strict=True):
        # codes of activations flip between any two evaluations: no farther from the fp32 one than plain bf16 torch is
        assert float((y - g).norm()) < 1.3 * float((p - g).norm())


@functools.cache
def nano(kind: str | None) -> Path:
    """The nano model as the hub stores it, or converted."""
    folder = Path(tempfile.mkdtemp(prefix="v4-nano-"))
    if kind is None:
        make(named_config("nano"), folder, 0)
    else:
        convert(nano(None), folder, kind)
    return folder


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean over positions of KL(softmax(p) || softmax(q)), in nats."""
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


@pytest.mark.slow
def test_the_whole_model_in_the_chips_mode(soc: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4_ASCEND_SOC", soc)
    mode = TARGETS[MODES[soc]]
    ids = [0, *((7919 * i) % 1000 + 5 for i in range(140))]
    bf16 = v4.load(nano(None), backend="ascend", max_context=512).logits(ids).cpu()
    model = v4.load(nano(mode.kind), backend="ascend", numerics=mode.numerics, max_context=512)
    found = model.logits(ids).cpu()
    plain = v4.load(nano(mode.kind), backend="cpu", numerics=mode.numerics, max_context=512).logits(ids)
    # logits of random weights have a deviation near 1: measured 0.006 (INT8) and 0.015 (MX), see docs/ascend.md
    assert mean_kl(bf16, found) < (0.015 if mode.kind == "int8" else 0.04)
    assert mean_kl(plain, found) < (0.015 if mode.kind == "int8" else 0.04)
    chunked = model.logits(ids, chunks=[3, 1, 124, len(ids) - 128]).cpu()
    assert mean_kl(found, chunked) < 0.02
    assert len(model.generate(ids[:40], 5, stop=[], speculative=True).tokens) == 5


TOO_SMALL = {"hc_pre", "hc_post", "compress", "index_topk", "sparse_attention"}
"""Ops whose fused forms refuse the nano model: widths of 4096 and 7168, 64 heads of 512, 64 index heads, at least 1024 channels."""
ALWAYS_PLAIN = {"linear", "hc_head", "argmax"}


@pytest.mark.parametrize("mode", ["bf16", "chip"])
def test_what_falls_to_plain_torch_in_the_nano_model(mode: str, soc: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4_ASCEND_SOC", soc)
    monkeypatch.setenv("V4_ASCEND_DEVICE", device.type)
    target = TARGETS[MODES[soc]]
    seen = Seen()
    binding = binding_of(soc, torch.bfloat16)

    def scope(place: str, ops: SimpleNamespace) -> SimpleNamespace:
        return watch(binding, seen, frozenset())

    path, numerics = (nano(None), "exact") if mode == "bf16" else (nano(target.kind), target.numerics)
    model = v4.load(path, backend="ascend", numerics=numerics, max_context=512, scope=scope)
    model.generate([0, *range(5, 140)], 3, stop=[])
    fallen = {op for op, labels in seen.labels.items() if any(label.startswith(("plain", "composed")) for label in labels)}
    # npu_mhc_pre takes any width
    too_small = TOO_SMALL - ({"hc_pre"} if soc == "950" else set())
    listed = ALWAYS_PLAIN | too_small
    assert fallen <= listed, {op: seen.labels[op] for op in fallen - listed}
    assert fallen >= too_small


def test_scales_of_one_group_lie_in_memory_one_by_one() -> None:
    scale = torch.full((1, 1), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert row_scales(scale, 128).stride() == (4, 2, 1)
