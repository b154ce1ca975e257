"""This project's own CANN op where no kernel can be: its schema in the C++ source, its model on CPU tensors (l2), and what tells that it is absent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import backends.ascend
from backends.ascend import own
from backends.ascend.hyper import HC_HEAD
from backends.ascend.probe import _hint, registered
from ops.contract import CONTRACTS
from ops.judge import judge
from ops.probe import Probe
from ops.registry import Binding, bind, load_backend
from tests.ascend.bound import judge_all
from tests.ascend.model_cases import arguments
from tools.npu_standin import models, schemas
from tools.npu_standin.package import OWN_KERNELS, offered

CSRC = Path(backends.ascend.__file__).with_name("csrc")
OP = "hc_head"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAKEN = {"one", "flash", "pro"}
"""Shapes of the contract's samples that the kernel has; the others have other widths, other streams or no token."""


def bound(soc: str, dtype: torch.dtype) -> Binding:
    load_backend("ascend")
    probe = Probe(device="cpu", soc=soc, ask=lambda name: name == HC_HEAD or registered(name))
    return bind(("ascend",), dtype=dtype, probes={"ascend": probe}, only=[OP])


@pytest.fixture
def offer(soc: str) -> Iterator[None]:
    with offered(own.NAMESPACE):
        yield


@pytest.mark.standin
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_model_meets_the_contract(dtype: torch.dtype, soc: str, offer: None) -> None:
    binding = bound(soc, dtype)
    samples = list(CONTRACTS[OP].samples(dtype, 0))
    labels, verdicts = judge_all(binding, OP, [s for s in samples if TAKEN & set(s.tags)], soc, torch.device("cpu"))
    assert labels == {f"{HC_HEAD} (own, optional)": 9}
    assert not [str(v) for v in verdicts if not v.ok]
    rest = [s for s in samples if not TAKEN & set(s.tags)]
    assert rest and not any(HC_HEAD in binding.impl_of(OP, s.args, s.kwargs).label for s in rest)


@pytest.mark.standin
def test_the_model_writes_and_aliases_what_its_schema_says(soc: str, offer: None) -> None:
    op = torch.ops.v4_ascend.hc_head.default
    torch.library.opcheck(op, (), arguments(HC_HEAD), test_utils=("test_schema",))


@pytest.mark.standin
def test_a_wrong_model_is_seen(soc: str, offer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = next(s for s in CONTRACTS[OP].samples(torch.bfloat16, 0) if "flash" in s.tags)
    right = bound(soc, torch.bfloat16).ops.hc_head
    for change in (lambda a, k: ((*a[:3], a[3] + 0.01), k), lambda a, k: (a, {**k, "norm_eps": 0.1}), lambda a, k: (a, {**k, "hc_eps": 0.05})):

        def wrong(*args, change=change, **kwargs):
            args, kwargs = change(args, kwargs)
            return right(*args, **kwargs)

        assert not judge(CONTRACTS[OP], wrong, sample).ok


@pytest.mark.standin
def test_what_is_offered_is_taken_back(soc: str) -> None:
    with offered(own.NAMESPACE):
        assert registered(HC_HEAD) or own.missing(OP)
        x = torch.ones(2, 4, 64)
        got = torch.ops.v4_ascend.hc_head(x, torch.zeros(4, 256), torch.ones(1), torch.zeros(4), norm_eps=0.0, hc_eps=0.5)
        assert torch.equal(got, torch.full((2, 64), 4.0))
    with pytest.raises((AttributeError, NotImplementedError, RuntimeError)):
        torch.ops.v4_ascend.hc_head(x, torch.zeros(4, 256), torch.ones(1), torch.zeros(4), norm_eps=0.0, hc_eps=0.5)


@pytest.mark.standin
def test_it_is_not_bound_when_it_is_not_installed(soc: str) -> None:
    load_backend("ascend")
    impl = next(i for i in CONTRACTS[OP].candidates("ascend") if i.needs)
    why = impl.refusal(Probe(soc=soc, ask=registered, hint=_hint), torch.bfloat16)
    assert why is not None
    assert re.match(rf"missing {HC_HEAD}: install both halves of this project's own ops \(docs/ascend.md\): ", why)
    assert "the torch half is not built (python -m backends.ascend)" in why or "no installed op package has its kernel" in why
    binding = bind(("ascend",), dtype=torch.bfloat16, probes={"ascend": Probe(soc=soc, ask=registered)}, only=[OP])
    assert all(i.label == "plain torch" for i in binding.impls[OP])


def test_the_source_registers_the_vendored_schema() -> None:
    source = (CSRC / "torch_half" / "hc_head.cpp").read_text(encoding="utf-8")
    (line,) = schemas.lines(own.NAMESPACE)
    assert f'm.def("{line.partition("::")[2]}")' in source
    assert f'KERNEL = "{OWN_KERNELS[0]}"' in source
    assert f"{own.NAMESPACE}::{OP}" in models.load()
