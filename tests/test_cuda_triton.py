"""The Triton kernels' side of binding, on machines without Triton too: who is used, why not, and which calls they leave to torch."""

from __future__ import annotations

import pytest
import torch

from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind, chain_of, load_backend

BACKEND = load_backend("cuda_triton")
HOPPER = Probe(device="cuda", soc="sm90", have=frozenset({"triton"}))
NAMES = sorted(n for n, c in CONTRACTS.items() if "cuda_triton" in c.impls)
BY_VALUE = {
    # what a shape rule can not see; contracts' checks and torch's can
    "sparse_attention": {"not-stored", "cmp-not-stored", "table-short", "cu-falls"},
    "index_topk": {"not-stored", "table-short", "cu-end", "start-negative"},
    "grouped_experts": {"counts-sum"},
    "grouped_experts_fp4": {"counts-sum"},
    "compress": {"lost", "table-range", "table-width", "offsets", "start", "entries"},
}


def used(probe: Probe, dtype: torch.dtype, op: str) -> tuple[tuple[str, ...], str]:
    binding = bind(chain_of("cuda"), dtype=dtype, probes={"cuda_triton": probe, "cuda": Probe(), "cpu": Probe()}, only=[op])
    choice = next(c for c in binding.choices if c.op == op)
    return choice.used, dict(choice.notes)["cuda_triton"]


def test_the_cuda_backend_is_both_in_order() -> None:
    assert chain_of("cuda") == ("cuda_triton", "cuda", "cpu")
    assert chain_of("cuda_triton", strict=True) == ("cuda_triton", "cuda")


@pytest.mark.parametrize("op", NAMES)
def test_on_hopper_kernels_stand_before_torch(op: str) -> None:
    assert used(HOPPER, torch.bfloat16, op)[0] == ("cuda_triton", "cuda")


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (Probe(device="cuda", soc="sm80", have=frozenset({"triton"})), "needs SoC sm90; found sm80"),
        (Probe(device="cuda", soc="sm90"), "missing triton"),
    ],
)
def test_elsewhere_torch_is_used_with_the_reason(probe: Probe, why: str) -> None:
    backends, note = used(probe, torch.bfloat16, "rms_norm")
    assert backends == ("cuda",) and why in note


def test_a_machine_without_triton_says_what_to_install() -> None:
    found = BACKEND.probe()
    assert found.hint is not None and "pip install triton" in found.hint(["triton"])


def test_products_of_fp32_are_left_to_torch() -> None:
    backends, note = used(HOPPER, torch.float32, "sparse_attention")
    assert backends == ("cuda",) and "no kernel for torch.float32" in note


@pytest.mark.parametrize("op", NAMES)
def test_wrong_shapes_go_to_torch_which_refuses_them(op: str) -> None:
    rule = CONTRACTS[op].impls["cuda_triton"].when
    assert rule is not None
    taken = {w.name for w in CONTRACTS[op].errors(torch.bfloat16) if rule(*w.args, **w.kwargs)}
    assert taken == BY_VALUE.get(op, set())


@pytest.mark.parametrize("op", NAMES)
def test_rules_read_no_values(op: str) -> None:
    """A call on tensors without data is decided as the same call with data."""
    contract = CONTRACTS[op]
    rule = contract.impls["cuda_triton"].when
    assert rule is not None

    def light(value: object) -> object:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    for sample in contract.samples(torch.bfloat16, 0):
        bare = rule(*map(light, sample.args), **{k: light(v) for k, v in sample.kwargs.items()})
        assert bare == rule(*sample.args, **sample.kwargs), sample.name
