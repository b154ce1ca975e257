"""Single layers of Flash and Pro at their published size: which op falls to plain torch, and what the layers compute.

What serves each call is decided by shapes and types. So the first half needs no numbers: whole layers, every expert at its width, run on device
meta, and each call is asked which implementation would take it. The second half computes layers with the published heads, hidden size, choices
and experts per token, once with every expert (narrow ones) and once with 8 experts of the published width, since both together are 25 GB for Pro
in W8A8.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backends.ascend.prepare import prepare
from backends.ascend.recipes import TARGETS
from ops.contract import CONTRACTS
from ops.registry import Binding, bind
from tests.ascend.bound import binding_of
from tests.ascend.layer import KINDS, Seen, config_of, run
from tests.ascend.test_adapters_layers import PLAIN as PLAIN_BF16
from tests.ascend.test_adapters_quantised import MODES, PRODUCTS, STORED
from tests.ascend.test_adapters_quantised import PLAIN as PLAIN_QUANTISED
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

BF16 = torch.bfloat16
NAMES, WAYS = ("flash", "pro"), ("bf16", "chip")
"""`chip`: the quantised mode of the chip, W8A8 on A2 and A3, FP8 and MXFP4 on 950."""
STEPS = (1, 3)
"""Tokens of the calls: a decoding step, and the verification of drafts."""


def stored(way: str, soc: str) -> dict[str, str]:
    """How linears and experts are stored."""
    linears, experts = ("dense", "dense") if way == "bf16" else STORED[TARGETS[MODES[soc]].kind]
    return {"linears": linears, "experts": experts}


def listed(way: str, kind: str, soc: str) -> set[str]:
    """Ops of a layer that plain torch serves; `linear`, in quantised layers for the indexer's weights only, is the vendor's own product."""
    return PLAIN_BF16[soc] if way == "bf16" else PLAIN_QUANTISED[MODES[soc]] | ({"linear"} if kind == "CSA" else set())


# ---- what serves a layer of the published size -------------------------------------------------------------------------------


def asked(binding: Binding, seen: Seen) -> SimpleNamespace:
    """Ops that note which implementation would take a call and answer with the shapes of its results."""

    def op(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.labels[name].add(binding.impl_of(name, args, kwargs).label)
            return CONTRACTS[name].meta(*args, **kwargs)

        return call

    return SimpleNamespace(**{name: op(name) for name in vars(binding.ops)})


def served(name: str, kind: str, way: str, soc: str, *, hashed: bool, without: tuple[str, ...] = ()) -> Seen:
    """Labels of every op of one layer with nothing made smaller, over the calls of STEPS behind a long context."""
    seen, config = Seen(), config_of(name, KINDS[kind], hashed=hashed, experts=None, inner=None)
    model = Model(Settings(config, asked(binding_of(soc, BF16, without=without), seen), BF16, **stored(way, soc)), mtp=False)
    assert all(p.is_meta for p in model.parameters())
    prepare(model)
    runner, context = Runner(model), 4 * config.index_topk + 37
    cache = runner.session(max_tokens=context + sum(STEPS), max_chunk=max(STEPS)).cache
    sequence = cache.new_sequence()
    cache.assume(sequence, context)
    for n in STEPS:
        runner.forward(cache, [sequence], [[7] * n])
    return seen


def fallen(seen: Seen) -> set[str]:
    return {op for op, labels in seen.labels.items() if any(label.startswith(("plain", "composed")) for label in labels)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_serves_a_layer_of_the_published_size(name: str, kind: str, way: str, soc: str) -> None:
    for hashed in (False, True):
        seen = served(name, kind, way, soc, hashed=hashed)
        assert fallen(seen) == listed(way, kind, soc), dict(seen.labels)
        assert ("gate_hash" if hashed else "gate_topk") in seen.labels
        assert way == "bf16" or PRODUCTS[TARGETS[MODES[soc]].kind] <= set(seen.labels)


@pytest.mark.parametrize("way", WAYS)
def test_an_op_that_falls_is_seen(way: str, soc: str) -> None:
    lost = fallen(served("pro", "CSA", way, soc, hashed=False, without=("custom", "cann_ops_transformer"))) - listed(way, "CSA", soc)
    assert lost >= {"compress", "index_topk", "sparse_attention", "hc_post"}


# ---- what a layer computes ---------------------------------------------------------------------------------------------------

WIDTHS = ("every expert, narrow", "8 experts, full width")
"""What is made smaller: the width of experts (64 channels, 128 where weights are FP4), or their number."""
KIND_OF = dict(zip(WIDTHS, ("CSA", "HCA"), strict=True))
"""The kinds that Pro has: what experts compute does not depend on the attention before them."""
JUDGED = frozenset(
    ("sparse_attention", "compress", "index_topk", "hc_pre", "hc_post", "gate_topk", "gate_hash", "clamped_swiglu", "rope", "q_norm_rope",
     "rms_norm", "norm_rope", "rms_norm_quant", "cache_insert", "grouped_linear", "quant_int8", "quant_mxfp8", "moe_dispatch", "moe_combine",
     "linear_int8", "linear_mx")
)  # fmt: skip
EXPERTS_JUDGED = frozenset(("moe_mlp", "moe_int8", "moe_mx"))
"""Judged where experts are narrow: the float64 golden of 8 full-width ones takes more memory than a small machine has."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("experts", WIDTHS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_layer(name: str, way: str, experts: str, soc: str, device: torch.device) -> None:
    kind, storage = KIND_OF[experts], stored(way, soc)
    every = experts == WIDTHS[0]
    narrow = 128 if storage["experts"] in ("fp4", "mx") else 64
    config = config_of(name, KINDS[kind], hashed=kind == "HCA", **({"experts": None, "inner": narrow} if every else {"inner": None}))
    call: dict[str, Any] = {"stored": 4 * config.index_topk + 37, "counts": list(STEPS), **storage}
    judged = JUDGED | EXPERTS_JUDGED if every else JUDGED
    host = device.type == "cpu"
    found, seen = run(config, binding_of(soc, BF16), prepare, device, judged=judged if host else frozenset(), **call)
    wrong = [str(v) for v in seen.verdicts if not v.ok]
    assert not wrong, "\n".join(wrong)
    assert len(seen.verdicts) > 20 or not host
    assert fallen(seen) == listed(way, kind, soc), dict(seen.labels)
    exact, plain = (run(config, bind(("cpu",), dtype=dtype), None, torch.device("cpu"), dtype=dtype, **call)[0] for dtype in (torch.float32, BF16))
    for y, p, g in zip(found, plain, exact, strict=True):
        # two evaluations of one layer in bf16, whose codes of activations flip where they are rounded: about as far from that in fp32
        assert float((y - g).norm()) < 1.3 * float((p - g).norm())
