"""The first thing to run on an NPU: every vendor op that is installed, on one legal call, against the model that the other tests believe.

V4_TEST_DEVICE=npu runs it there. On the stand-in's device (V4_TEST_LEVEL=l3) the same lines run with the models behind the ops, which only shows
that the comparison works. What a model leaves undefined is not compared. Tolerances are those of upstream's own tests, rounded up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.ascend.limits import limits
from backends.ascend.own import NAMESPACE, missing
from tests.ascend import model_cases_paged  # noqa: F401 - adds cases
from tests.ascend.conftest import HARDWARE
from tests.ascend.model_cases import CASES, arguments
from tests.ascend.model_variants import VARIANTS
from tools.npu_standin import models, schemas

NAMES = sorted(n for n in CASES if "::" in n and not n.endswith("_metadata") and n != "npu::npu_format_cast")
RELATIVE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 4e-3, torch.float8_e4m3fn: 0.15, torch.float8_e5m2: 0.3}
SAME_SHARE = 0.99
"""Share of equal elements asked of indices and packed codes: near ties may fall either way."""


def _there(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    return [_there(v, device) for v in value] if isinstance(value, list) else value


def _op(name: str) -> Any:
    space, _, op = name.partition("::")
    if name not in torch._C._dispatch_get_all_op_names():
        pytest.skip(f"{name} is not installed")
    return getattr(getattr(torch.ops, space), op)


def _written(name: str) -> list[str]:
    return [a.name for a in schemas.schema(name).arguments if a.alias_info is not None and a.alias_info.is_write]


def _defined(t: torch.Tensor) -> torch.Tensor:
    """True where a model has written: not every byte is 0xCD."""
    raw = t.contiguous().view(torch.uint8).view(*t.shape, t.element_size()) if t.dim() else t.view(1).view(torch.uint8)
    return (raw != models.POISON).any(-1).view(t.shape)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """What is wrong with an output, None when it is near enough."""
    bytes_ = (torch.uint8, torch.float8_e8m0fnu)  # host code and Meta name powers of two differently
    if found.dtype in bytes_ and wanted.dtype in bytes_:
        found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"{list(found.shape)} {found.dtype}, the model gives {list(wanted.shape)} {wanted.dtype}"
    kept = _defined(wanted)
    if not bool(kept.any()):
        return None
    a, b = found[kept].double(), wanted[kept].double()
    if wanted.is_floating_point():
        allowed = RELATIVE[wanted.dtype] * (b.abs() + b.abs().mean())
        bad = int(((a - b).abs() > allowed).sum())
        return f"{bad} of {b.numel()} values differ, the worst by {float((a - b).abs().max()):.3g}" if bad else None
    if wanted.dtype == torch.int8:
        return f"codes differ by up to {int((a - b).abs().max())}" if bool(((a - b).abs() > 1).any()) else None
    share = float((a == b).double().mean())
    return f"only {share:.1%} of {b.numel()} are equal" if share < SAME_SHARE else None


CALLS = {n: (n, tuple(sorted(limits()[n].chips)), lambda g: {}) for n in NAMES} | VARIANTS
NO_BRIDGE = {
    "npu::npu_grouped_matmul_swiglu_quant_v2",
    "npu::npu_moe_token_permute",
    "npu::npu_moe_token_unpermute",
    "npu::npu_rms_norm_dynamic_mx_quant",
}
"""Ops that no adapter calls: the stand-in's device has no way from torch_npu's host code to their models."""


@pytest.mark.device
@pytest.mark.parametrize("call", sorted(CALLS))
def test_the_op_does_what_its_model_says(call, soc, device, on_chip):
    on_chip(soc)
    name, chips, make = CALLS[call]
    if soc not in chips:
        pytest.skip(f"documented for {', '.join(chips)}")
    if name in NO_BRIDGE and not HARDWARE:
        pytest.skip("hardware only")
    space, _, plain = name.partition("::")
    if space == NAMESPACE and (why := missing(plain)):
        pytest.skip(f"our own op is optional: {why}")
    op, passed = _op(name), arguments(name, **make(torch.Generator().manual_seed(2)))
    here = {k: _there(v, device) for k, v in passed.items()}
    if "metadata" in passed:
        about = {**arguments(f"{name}_metadata")}
        placed = {k: _there(v, device) for k, v in about.items()} | ({"device": str(device)} if "device" in about else {})
        here["metadata"] = _op(f"{name}_metadata")(**placed)
    wanted, found = models.MODELS[name](**passed), op(**here)
    torch.npu.synchronize()
    pairs = [*zip(_list(found), _list(wanted), strict=False), *((here[n], passed[n]) for n in _written(name))]
    complaints = [f"{i}: {text}" for i, (f, w) in enumerate(pairs) if w is not None and (text := difference(f.cpu(), w))]
    assert pairs
    assert not complaints, "\n".join(complaints)


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize(
    "found,wanted,right",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.001, 2.0]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.0]), False),
        (torch.tensor([3], dtype=torch.int8), torch.tensor([4], dtype=torch.int8), True),
        (torch.tensor([3], dtype=torch.int8), torch.tensor([5], dtype=torch.int8), False),
        (torch.tensor([7, 8]), torch.tensor([7, 9]), False),
        (torch.zeros(2), models.undefined((2,), torch.float32), True),
        (torch.zeros(2).half(), torch.zeros(2), False),
        (torch.zeros(3), torch.zeros(2), False),
    ],
)
def test_the_comparison(found, wanted, right):
    assert (difference(found, wanted) is None) is right
