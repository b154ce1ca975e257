"""Every kernel against the judge: the contract's samples that its shape rule takes, and mutants that have to be rejected."""

from __future__ import annotations

import pytest
import torch

from ops.contract import CONTRACTS, Contract, Impl, Sample
from ops.judge import golden_of, judge
from ops.mutants import MUTANTS
from ops.probe import Probe
from ops.registry import load_backend, on_device

BACKEND = load_backend("cuda_triton")
HOPPER = Probe(device="cuda", soc="sm90", have=frozenset({"triton"}))
DTYPES = (torch.float32, torch.bfloat16)
FEWEST = {"sparse_attention": 12}
CASES = [
    (name, dtype)
    for name, contract in sorted(CONTRACTS.items())
    if (impl := contract.impls.get("cuda_triton"))
    for dtype in DTYPES
    if impl.refusal(HOPPER, dtype) is None
]


def impl_of(name: str) -> tuple[Contract, Impl]:
    return CONTRACTS[name], CONTRACTS[name].impls["cuda_triton"]


def taken(contract: Contract, impl: Impl, dtype: torch.dtype, seed: int) -> list[Sample]:
    assert impl.when is not None, "without a shape rule there is nothing behind this backend"
    samples = [s for s in contract.samples(dtype, seed) if impl.when(*s.args, **s.kwargs)]
    if not torch.cuda.is_available() and contract.name.startswith("hc_"):
        # 300 tokens of 8 channels: minutes in the interpreter, and no size that the others lack
        samples = [s for s in samples if "many" not in s.tags]
    return samples


def runnable(contract: Contract, impl: Impl):
    return on_device(impl.fn, contract, BACKEND.DEVICE) if torch.cuda.is_available() else impl.fn


@pytest.mark.parametrize("name,dtype", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_kernel_agrees_with_the_golden(name: str, dtype: torch.dtype, seed: int) -> None:
    contract, impl = impl_of(name)
    samples = taken(contract, impl, dtype, seed)
    assert len(samples) >= FEWEST.get(name, 5), f"{name}: only {len(samples)} samples meet its shape rule"
    for sample in samples:
        verdict = judge(contract, runnable(contract, impl), sample)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("name,dtype", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_mutants_of_the_kernel_are_rejected(name: str, dtype: torch.dtype, seed: int) -> None:
    contract, impl = impl_of(name)
    fn, left = runnable(contract, impl), [m for m in MUTANTS[name].values() if dtype in m.dtypes]
    samples = sorted(taken(contract, impl, dtype, seed), key=lambda s: sum(a.numel() for a in s.args if isinstance(a, torch.Tensor)))
    for sample in samples:
        golden = golden_of(contract, sample)
        left = [m for m in left if judge(contract, m.make(fn), sample, golden=golden).ok]
        if not left:
            break
    assert [str(m) for m in left] == []
