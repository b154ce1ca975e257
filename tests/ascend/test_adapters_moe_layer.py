"""All experts of a layer with the shared expert's first weight behind the routed ones, as weight preparation leaves it: judged, and with which ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.ascend.moe_layer import behind
from backends.ascend.prepare import prepare
from ops.contract import CONTRACTS, Sample
from ops.judge import Verdict, golden_of, judge
from tests.ascend.bound import binding_of
from tests.ascend.layer import config_of, fill
from tools.npu_standin.calls import recording
from v4.moe import MoE
from v4.settings import Settings

OLDER = ("910b", "910_93")
BF16 = torch.bfloat16


def samples() -> list[Sample]:
    return [s for s in CONTRACTS["moe_int8"].samples(BF16, 0) if s.args[5].shape[2] % 64 == 0 and s.args[0].shape[0]]


def stacked(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """fn on the device with the shared w13 laid behind the routed one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        there = [a.to(device) for a in args]
        both = torch.cat((there[3], there[7][None]))
        there[3], there[7] = both[:-1], both[-1]
        return fn(*there, **kwargs).cpu()

    return call


def judged(soc: str, device: torch.device, sample: Sample) -> tuple[Verdict, str, Callable[..., Any]]:
    binding = binding_of(soc, BF16, "moe_int8")
    fn = stacked(binding.ops.moe_int8, device)
    both = torch.cat((sample.args[3], sample.args[7][None]))
    args = (*sample.args[:3], both[:-1], *sample.args[4:7], both[-1], *sample.args[8:])
    return judge(CONTRACTS["moe_int8"], fn, sample), binding.impl_of("moe_int8", args, sample.kwargs).label, fn


@pytest.mark.parametrize("sample", samples(), ids=lambda s: s.name)
def test_stacked_experts_are_right(sample: Sample, soc: str, device: torch.device) -> None:
    if soc not in OLDER:
        pytest.skip("INT8 experts with a fused activation are for A2 and A3")
    verdict, label, fn = judged(soc, device, sample)
    assert verdict.ok, str(verdict)
    assert "with the shared expert" in label
    # the rows of the shared expert come last: a wrong split between the two would show here
    silent = replace(sample, args=(*sample.args[:2], torch.zeros_like(sample.args[2]), *sample.args[3:]))
    (golden,) = golden_of(CONTRACTS["moe_int8"], silent)
    assert float((fn(*silent.args, **silent.kwargs).double() - golden).norm()) < 0.05 * float(golden.norm())


def test_what_lies_elsewhere_is_not_taken_for_stacked() -> None:
    both = torch.arange(3 * 4 * 5, dtype=torch.int8).view(3, 4, 5)
    found = behind(both[:2], both[2])
    assert found is not None and torch.equal(found, both)
    assert behind(both[:2], both[2].clone()) is None
    assert behind(both[:1], both[2]) is None
    assert behind(both[:2], both[2].float()) is None
    assert behind(both[:2].transpose(1, 2), both[2].T) is None


def test_preparation_lays_the_shared_weight_behind_the_routed_ones(soc: str, device: torch.device) -> None:
    ops = binding_of(soc, BF16).ops
    layer = MoE(Settings(config_of("flash", 0), ops, BF16, linears="int8", experts="int8"), hashed=False)
    fill(layer, device)
    routed, shared = layer.experts.w13.cpu().clone(), layer.shared_experts.w13.weight.cpu().clone()
    prepare(layer)
    assert behind(layer.experts.w13, layer.shared_experts.w13.weight) is not None
    assert torch.equal(layer.experts.w13.cpu(), routed) and torch.equal(layer.shared_experts.w13.weight.cpu(), shared)


def test_a_token_takes_one_quantisation(soc: str, device: torch.device) -> None:
    ops = binding_of(soc, BF16).ops
    kind = "mx" if soc == "950" else "int8"
    layer = MoE(Settings(config_of("flash", 0), ops, BF16, linears=kind, experts=kind), hashed=False)
    fill(layer, device)
    prepare(layer)
    x, ids = torch.randn(2, 4096).to(BF16).to(device), torch.tensor([1, 2]).to(device)
    layer(x, ids)
    with recording() as record:
        layer(x, ids)
    quants = [c.name for c in record.calls if "dynamic" in c.name.lower() and "quant" in c.name.lower()]
    assert len(quants) == 1, quants
