"""Every contract by itself: documented, refusing wrong inputs, meta equal to its reference, float64-clean, costed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import CONTRACTS
from ops.contract import Contract, Sample
from ops.judge import _flat, call_with_clones, judge
from ops.registry import load_backend, signature

DTYPES = (torch.float32, torch.bfloat16)
NAMES = sorted(CONTRACTS)
NATIVE = load_backend("cpu_native")
EXPECTED = {
    "rms_norm", "unit_rms_norm", "add_rms_norm", "q_norm_rope", "rope", "quant_fp8", "dequant_fp8", "dequant_fp8_block", "quant_mxfp8",
    "quant_mxfp4", "dequant_mxfp4", "quant_int8", "dequant_int8", "roundtrip_fp8", "roundtrip_fp4", "hadamard", "linear", "linear_fp8",
    "linear_fp4", "linear_int8", "grouped_linear", "hc_pre", "hc_post", "hc_head", "cache_insert", "cache_insert_fp8", "index_insert_fp8",
    "index_insert_fp4", "compress", "index_topk", "sparse_attention", "gate_topk", "gate_hash", "clamped_swiglu", "moe_dispatch",
    "grouped_experts", "grouped_experts_fp4", "grouped_experts_fp8", "moe_combine", "moe_mlp", "all_reduce", "all_gather", "all_to_all",
    "argmax", "sample", "grouped_experts_int8", "linear_mx", "moe_int8", "moe_mx", "norm_rope", "rms_norm_quant",
}  # fmt: skip


def samples(contract: Contract, dtype: torch.dtype, seed: int = 0) -> list[Sample]:
    return list(contract.samples(dtype, seed))


def test_every_op_of_the_model_is_declared() -> None:
    assert set(CONTRACTS) == EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_documented(name: str) -> None:
    doc = inspect.getdoc(CONTRACTS[name].reference) or ""
    assert len(doc) > 80 and "[" in doc, f"{name}: the reference's docstring must state meaning and shapes"
    assert "ource" in doc or "pecification" in doc, f"{name}: the docstring must name its source"


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_raise_the_stated_error(name: str) -> None:
    contract = CONTRACTS[name]
    wrong = list(contract.errors(torch.float32))
    assert wrong, f"{name} declares no wrong inputs"
    for case in wrong:
        with pytest.raises(ValueError, match=case.match):
            contract.meta(*case.args, **case.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_samples_cover_zero_and_one_token(name: str) -> None:
    tags = {tag for sample in samples(CONTRACTS[name], torch.float32) for tag in sample.tags}
    assert {"zero", "one", "odd"} <= tags, f"{name}: sample tags {sorted(tags)}"


def _meta(value: Any) -> Any:
    heavy = isinstance(value, Tensor) and (value.dtype not in (torch.int32, torch.int64))
    return value.to("meta") if heavy else value


@pytest.mark.parametrize("name", NAMES)
def test_meta_and_cost_work_without_data(name: str) -> None:
    contract = CONTRACTS[name]
    for sample in samples(contract, torch.bfloat16):
        light = replace(sample, args=tuple(map(_meta, sample.args)), kwargs={k: _meta(v) for k, v in sample.kwargs.items()})
        assert all(t.is_meta for t in _flat(contract.meta(*light.args, **light.kwargs)))
        cost = contract.cost(*light.args, **light.kwargs)
        assert cost == contract.cost(*sample.args, **sample.kwargs)
        assert min(cost.matmul_flops, cost.vector_flops, cost.bytes_read, cost.bytes_written) >= 0
        assert cost.rate in ("fp32", "bf16", "fp8", "fp4", "int8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_reference_in_float32_lies_within_the_bound(name: str, dtype: torch.dtype) -> None:
    contract = CONTRACTS[name]
    for sample in samples(contract, dtype):
        shapes = _flat(contract.meta(*sample.args, **sample.kwargs))

        def rounded(*args: Any, shapes: list[Tensor] = shapes, **kwargs: Any) -> list[Tensor]:
            found = _flat(contract.reference(*args, compute=torch.float32, **kwargs))
            return [f.to(s.dtype) for f, s in zip(found, shapes, strict=True)]

        verdict = judge(contract, rounded, sample)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_float64_clean(name: str) -> None:
    contract = CONTRACTS[name]
    for sample in samples(contract, torch.float32)[:4]:
        outputs, _ = call_with_clones(contract, contract.reference, sample, compute=torch.float64)
        shapes = _flat(contract.meta(*sample.args, **sample.kwargs))
        for out, shape in zip(outputs, shapes, strict=False):
            assert out.shape == shape.shape
            if shape.dtype in (torch.float32, torch.bfloat16) and not contract.name.startswith(
                ("roundtrip", "quant", "moe_dispatch")
            ):
                assert out.dtype == torch.float64, f"{name}: golden output is {out.dtype}"


@pytest.mark.parametrize("backend", ["cpu", "cpu_invariant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_backend_agrees_with_the_golden(name: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    load_backend(backend)
    contract = CONTRACTS[name]
    assert backend in contract.impls or contract.compose, f"{name} has no {backend} implementation"
    if backend not in contract.impls:
        return
    cases = samples(contract, dtype, seed)
    assert cases
    for sample in cases:
        verdict = judge(contract, contract.impls[backend].fn, sample)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("name", [n for n in NAMES if "cpu_native" in CONTRACTS[n].impls])
def test_compiled_kernels_agree_with_the_golden(name: str, seed: int) -> None:
    contract, impl = CONTRACTS[name], CONTRACTS[name].impls["cpu_native"]
    if (reason := impl.refusal(NATIVE.probe(), torch.float32)) is not None:
        pytest.skip(reason)
    assert impl.when is not None
    judged = 0
    for s in range(seed, seed + 5):
        for sample in samples(contract, torch.float32, s):
            if impl.when(*sample.args, **sample.kwargs):
                verdict = judge(contract, impl.fn, sample)
                assert verdict.ok, str(verdict)
                judged += 1
    assert judged >= 5, f"{name}: only {judged} samples meet its shape rule"


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_positional_then_keyword(name: str) -> None:
    kinds = {p.kind for p in signature(CONTRACTS[name]).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
