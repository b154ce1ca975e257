"""Every op of the ascend backend that has an adapter, on every chip and type: the contract's samples and inputs of the real widths."""

from __future__ import annotations

import pytest
import torch

from ops.contract import CONTRACTS
from ops.registry import load_backend
from tests.ascend.bound import binding_of, judge_all
from tests.ascend.wide import wide
from tools.ascend_parity import declared

load_backend("ascend")
ADAPTED = sorted(name for name, contract in CONTRACTS.items() if any(i.name for i in contract.candidates("ascend")))
PRECISION = declared()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plain(label: str) -> bool:
    return label.startswith(("plain torch", "composed of"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ADAPTED)
def test_samples_of_the_contract(op: str, dtype: torch.dtype, soc: str, device: torch.device) -> None:
    binding = binding_of(soc, dtype, op)
    samples = list(CONTRACTS[op].samples(dtype, 0))
    if dtype == torch.float16:  # plain torch is not held to the contracts in fp16, only adapters are
        samples = [s for s in samples if not plain(binding.impl_of(op, s.args, s.kwargs).label)]
    labels, verdicts = judge_all(binding, op, samples, soc, device)
    wrong = [str(v) for v in verdicts if not v.ok or v.worst > PRECISION.classes[PRECISION.contracts[op]].worst]
    assert not wrong, "\n".join([str(dict(labels)), *wrong])


@pytest.mark.parametrize("op", ADAPTED)
def test_real_widths(op: str, soc: str, device: torch.device) -> None:
    samples = wide(op)
    labels, verdicts = judge_all(binding_of(soc, torch.bfloat16, op), op, samples, soc, device)
    wrong = [str(v) for v in verdicts if not v.ok]
    assert not wrong, "\n".join([str(dict(labels)), *wrong])


SERVED = (
    "rms_norm", "unit_rms_norm", "rope", "q_norm_rope", "cache_insert", "hc_post", "gate_topk", "gate_hash", "grouped_linear",
    "clamped_swiglu", "moe_dispatch", "grouped_experts", "moe_combine", "moe_mlp", "compress", "index_topk", "sparse_attention", "hc_pre",
)  # fmt: skip
"""Ops of a bf16 run that a vendor op, or a composition of ours, takes at the real widths."""


@pytest.mark.parametrize("op", SERVED)
def test_no_call_of_the_real_widths_falls_to_plain_torch(op: str, soc: str) -> None:
    if op == "hc_pre" and soc == "910b":
        pytest.skip("npu_hc_pre_inv_rms and npu_hc_pre_sinkhorn are documented for A3 and 950")
    binding = binding_of(soc, torch.bfloat16, op)
    samples = [s for s in wide(op) if op != "gate_hash" or s.args[2].dtype == torch.int32]
    if op == "cache_insert":
        samples = [s for s in CONTRACTS[op].samples(torch.bfloat16, 0) if s.args[1].shape[1] == 512]
    fallen = [s.name for s in samples if plain(binding.impl_of(op, s.args, s.kwargs).label) and "weighted" not in s.name]
    assert not fallen


@pytest.mark.parametrize("op", ADAPTED)
def test_without_the_op_packages_everything_still_runs(op: str, soc: str, device: torch.device) -> None:
    binding = binding_of(soc, torch.bfloat16, op, without=("custom", "cann_ops_transformer"))
    _, verdicts = judge_all(binding, op, list(CONTRACTS[op].samples(torch.bfloat16, 0))[:6], soc, device)
    assert all(v.ok for v in verdicts), [str(v) for v in verdicts if not v.ok]
    assert "custom" not in " ".join(i.label for i in binding.impls[op])
