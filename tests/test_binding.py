"""Choosing implementations: refusals with reasons, overrides, strictness, no silent fallback."""

from __future__ import annotations

import pytest
import torch

from ops import CONTRACTS, NoImplementation, bind
from ops.contract import Contract, Impl
from ops.norm import rms_norm
from ops.probe import Probe
from ops.registry import load_backend, parse_overrides


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Contract:
    """rms_norm with a backend of our own instead of the registered ones."""
    load_backend("cpu_invariant")
    monkeypatch.setattr(rms_norm, "impls", dict(rms_norm.impls))
    return rms_norm


def put(contract: Contract, backend: str, **facts: object) -> None:
    base: dict[str, object] = {"dtypes": frozenset(), "soc": frozenset(), "needs": (), "when": None, "note": ""}
    contract.impls[backend] = Impl(backend=backend, fn=contract.impls["cpu"].fn, **{**base, **facts})  # type: ignore[arg-type]


def test_every_op_binds_on_the_cpu() -> None:
    binding = bind(("cpu",), dtype=torch.float32)
    assert {c.op for c in binding.choices} == set(CONTRACTS)
    assert "rms_norm" in binding.explain()
    assert binding.table()[0].keys() == {"op", "used", "notes"}


def test_missing_implementation_lists_every_reason(spare: Contract) -> None:
    put(spare, "cpu_invariant", soc=frozenset({"910b"}))
    put(spare, "cpu", needs=("npu::npu_rms_norm",))
    with pytest.raises(NoImplementation) as caught:
        bind(("cpu_invariant", "cpu"), dtype=torch.float32, only=["rms_norm"])
    text = str(caught.value)
    assert "needs SoC 910b; found none" in text and "missing npu::npu_rms_norm" in text and "rms_norm" in text


def test_a_made_up_probe_satisfies_needs(spare: Contract) -> None:
    put(spare, "cpu", needs=("npu::npu_rms_norm",), soc=frozenset({"910b"}))
    probe = Probe(soc="910b", have=frozenset({"npu::npu_rms_norm"}))
    assert bind(("cpu",), dtype=torch.float32, probes={"cpu": probe}, only=["rms_norm"]).choices[0].used == ("cpu",)


def test_a_dtype_without_kernel_is_refused_with_the_ones_it_has(spare: Contract) -> None:
    put(spare, "cpu", dtypes=frozenset({torch.bfloat16}))
    with pytest.raises(NoImplementation, match=r"no kernel for torch.float32; has torch.bfloat16"):
        bind(("cpu",), dtype=torch.float32, only=["rms_norm"])


def test_a_shape_rule_needs_something_behind_it(spare: Contract) -> None:
    put(spare, "cpu_invariant", when=lambda x, weight, *, eps: x.shape[0] > 1)
    both = bind(("cpu_invariant", "cpu"), dtype=torch.float32, only=["rms_norm"])
    assert both.choices[0].used == ("cpu_invariant", "cpu")
    x, w = torch.randn(1, 8), torch.ones(8)
    assert torch.allclose(both.ops.rms_norm(x, w, eps=1e-6), rms_norm.reference(x, w, eps=1e-6))
    with pytest.raises(NoImplementation):
        bind(("cpu_invariant",), dtype=torch.float32, only=["rms_norm"])


def test_override_wins_over_the_chain_and_the_environment(spare: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    put(spare, "cpu_invariant")
    monkeypatch.setenv("V4_OPS", "rms_norm=cpu_invariant")
    assert bind(("cpu",), dtype=torch.float32, only=["rms_norm"]).choices[0].used == ("cpu_invariant",)
    chosen = bind(("cpu",), dtype=torch.float32, only=["rms_norm"], overrides={"rms_norm": "cpu"})
    assert chosen.choices[0].used == ("cpu",)


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        bind(("cpu",), dtype=torch.float32, overrides={"rmsnorm": "cpu"})
    with pytest.raises(ValueError, match="unknown backend 'cppu'.*did you mean 'cpu'"):
        bind(("cppu",), dtype=torch.float32)
    with pytest.raises(ValueError, match="found 'rms_norm', expected op=backend"):
        parse_overrides("rms_norm")


def test_checked_calls_refuse_wrong_inputs() -> None:
    x, w = torch.zeros(2, 8), torch.ones(4)
    with pytest.raises(ValueError, match="weight has shape"):
        bind(("cpu",), dtype=torch.float32, checked=True, only=["rms_norm"]).ops.rms_norm(x, w, eps=1e-6)


def test_a_bound_op_is_the_plain_function() -> None:
    assert bind(("cpu",), dtype=torch.float32, only=["rms_norm"]).ops.rms_norm is rms_norm.impls["cpu"].fn


def test_signature_mismatch_and_double_registration_are_refused() -> None:
    with pytest.raises(ValueError, match="signature differs"):
        rms_norm.implement("elsewhere")(lambda x, weight, eps: x)
    load_backend("cpu")
    with pytest.raises(ValueError, match="registered twice"):
        rms_norm.implement("cpu")(rms_norm.impls["cpu"].fn)


def test_composed_op_is_made_of_the_bound_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    load_backend("cpu")
    contract = CONTRACTS["q_norm_rope"]
    monkeypatch.setattr(contract, "impls", {})
    binding = bind(("cpu",), dtype=torch.float32, only=["q_norm_rope"])
    choice = next(c for c in binding.choices if c.op == "q_norm_rope")
    assert choice.used == ("cpu",) and "composed of unit_rms_norm, rope" in dict(choice.notes)["cpu"]
    q, angle = torch.randn(3, 2, 16), torch.randn(3, 4)
    found = binding.ops.q_norm_rope(q, angle.cos(), angle.sin(), eps=1e-6)
    assert torch.allclose(found, contract.reference(q, angle.cos(), angle.sin(), eps=1e-6, compute=torch.float32), atol=1e-6)


def test_candidates_of_one_backend_are_tried_in_order_and_every_refusal_is_told(spare: Contract) -> None:
    calls: list[str] = []

    def candidate(name: str, **facts: object) -> None:
        def fn(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
            calls.append(name)
            return spare.impls["cpu"].fn(x, weight, eps=eps)

        spare.implement("cpu_invariant", name=name, **facts)(fn)  # type: ignore[arg-type]

    del spare.impls["cpu_invariant"]
    candidate("first", needs=("vendor::first",))
    candidate("second", when=lambda x, weight, *, eps: x.shape[0] > 1)
    candidate("third", dtypes=(torch.bfloat16,))
    candidate("")
    with pytest.raises(ValueError, match="'cpu_invariant:second' registered twice"):
        candidate("second")
    binding = bind(("cpu_invariant",), dtype=torch.float32, only=["rms_norm"])
    x, w = torch.randn(2, 8), torch.ones(8)
    binding.ops.rms_norm(x, w, eps=1e-6)
    binding.ops.rms_norm(x[:1], w, eps=1e-6)
    assert calls == ["second", ""]
    assert [i.name for i in binding.impls["rms_norm"]] == ["second", ""]
    assert binding.impl_of("rms_norm", (x, w), {"eps": 1e-6}).name == "second"
    note = dict(binding.choices[0].notes)["cpu_invariant"]
    assert "second where its shape rule holds, else" in note
    assert "first: missing vendor::first" in note and "third: no kernel for torch.float32" in note
    assert "missing vendor::first" in binding.explain()


def test_checked_calls_run_inside_the_backends_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    seen: list[str] = []

    @contextmanager
    def checks(probe: Probe):  # type: ignore[no-untyped-def]
        seen.append("in")
        yield
        seen.append("out")

    monkeypatch.setattr(load_backend("cpu"), "checks", checks, raising=False)
    x, w = torch.randn(2, 8), torch.ones(8)
    bind(("cpu",), dtype=torch.float32, checked=True, only=["rms_norm"]).ops.rms_norm(x, w, eps=1e-6)
    assert seen == ["in", "out"]
    bind(("cpu",), dtype=torch.float32, only=["rms_norm"]).ops.rms_norm(x, w, eps=1e-6)
    assert seen == ["in", "out"]
