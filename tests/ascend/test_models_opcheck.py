"""The models under the released schemas: torch's opcheck compares each with the Meta kernel of torch_npu and with its aliasing annotations."""

from __future__ import annotations

import pytest
import torch

from backends.ascend.limits import limits
from tests.ascend import model_cases_paged  # noqa: F401 - adds cases
from tests.ascend.model_cases import CASES, Arguments, arguments
from tests.ascend.model_variants import VARIANTS
from tools.npu_standin import models

pytestmark = [pytest.mark.standin]

NO_META = {"npu::npu_format_cast"}
"""Ops of the wheel without a Meta kernel."""
NONE_AT_RUN_TIME = {"npu::npu_mhc_pre", "npu::npu_mhc_sinkhorn"}
"""Ops whose Meta promises tensors where the call returns None."""
WHEEL = sorted(name for name in CASES if name.startswith("npu::") and name not in NO_META | NONE_AT_RUN_TIME)
OTHERS = sorted(name for name in CASES if "::" in name and not name.startswith(("npu::", "v4_ascend::")))
"""Ops of packages that the stand-in installs; the own op has tests of its own, test_own_op.py."""


def _op(name: str) -> torch._ops.OpOverload:
    space, _, op = name.partition("::")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops, space), op).default
    return found


def _checks(passed: Arguments) -> tuple[str, ...]:
    """opcheck's own comparison of arguments before and after can not handle fp8."""
    tensors = [
        t for value in passed.values() for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)
    ]
    return (
        ("test_faketensor",)
        if any(t.dtype.itemsize == 1 and t.is_floating_point() for t in tensors)
        else ("test_schema", "test_faketensor")
    )


@pytest.mark.wheel
@pytest.mark.parametrize("name", WHEEL)
def test_the_model_returns_what_the_wheels_meta_promises(name, soc):
    if soc not in limits()[name].chips:
        with pytest.raises(models.Refused):
            _op(name)(**arguments(name))
        return
    passed = arguments(name)
    torch.library.opcheck(_op(name), (), passed, test_utils=_checks(passed))


@pytest.mark.wheel
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_model_of_a_variant_returns_what_the_wheels_meta_promises(variant, soc):
    name, chips, make = VARIANTS[variant]
    passed = arguments(name, **make(torch.Generator().manual_seed(2)))
    if soc not in chips:
        with pytest.raises(models.Refused):
            _op(name)(**passed)
        return
    torch.library.opcheck(_op(name), (), passed, test_utils=_checks(passed))


@pytest.mark.parametrize("name", OTHERS)
def test_the_model_writes_and_aliases_what_its_schema_says(name, soc):
    if soc in limits()[name].chips:
        torch.library.opcheck(_op(name), (), arguments(name), test_utils="test_schema")
