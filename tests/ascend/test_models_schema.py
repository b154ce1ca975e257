"""Every model has the parameters of its vendor schema: names, order, keyword-only or not, defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from backends.ascend.limits import limits
from tools.npu_standin import models, schemas
from tools.npu_standin.models.cann_functions import FUNCTIONS

pytestmark = pytest.mark.standin

NAMES = sorted(models.load())
UNUSED = {"custom::kv_compress_epilog", "custom::indexer_compress_epilog"}
"""Models without limits: no adapter calls them."""


def _of_model(fn: Any) -> list[tuple[str, bool, Any]]:
    parameters = inspect.signature(fn).parameters.values()
    return [(p.name, p.kind is p.KEYWORD_ONLY, _plain(p.default)) for p in parameters]


def _of_schema(schema: torch.FunctionSchema) -> list[tuple[str, bool, Any]]:
    return [
        (a.name, a.kwarg_only, _plain(a.default_value if a.has_default_value() else inspect.Parameter.empty))
        for a in schema.arguments
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_schema(name):
    found, expected = _of_model(models.MODELS[name]), _of_schema(schemas.schema(name))
    assert [p[:2] for p in found] == [p[:2] for p in expected]
    for (argument, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
        # a default of 1e-6 is printed with all its digits
        assert ours == theirs or ours == pytest.approx(theirs, rel=1e-12), argument


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_documented(name):
    assert models.MODELS[name].__doc__


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNUSED))
def test_every_model_has_its_limits_written_down(name):
    assert name in limits()


@pytest.mark.parametrize("name", sorted(limits()))
def test_limits_name_arguments_of_the_schema(name):
    entry = limits()[name]
    if entry.schema is not None:
        schema = torch._C.parse_schema(f"functions::{entry.schema}")
        assert _of_model(FUNCTIONS[name.partition(".")[2]])[0][0] == schema.arguments[0].name
    else:
        schema = schemas.schema(name)
    arguments = {a.name for a in schema.arguments}
    assert set(entry.layout) <= arguments
    assert set(entry.explicit) <= arguments
    assert entry.chips <= set(models.SOCS)


def test_a_second_model_of_an_op_is_refused():
    with pytest.raises(ValueError, match="two models"):
        models.model("npu::npu_rms_norm")(lambda: None)


def test_an_op_without_a_kernel_on_a_chip_is_refused(on_chip):
    on_chip("950")
    with pytest.raises(models.Refused, match="no kernel for SoC 950"):
        models.MODELS["custom::scatter_nd_update_asc"](torch.zeros(4, 128), torch.zeros(1, 1).int(), torch.zeros(1, 128))


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="known: 910b, 910_93, 950"):
        models.set_soc("910c")


def test_poison_fills_every_byte():
    for dtype in (torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.float8_e4m3fn, torch.uint8):
        found = models.undefined((3, 5), dtype)
        assert set(found.view(torch.uint8).flatten().tolist()) == {0xCD}
        rows = torch.zeros(4, 5).to(dtype)
        models.poison(rows[2:])
        assert set(rows[2:].contiguous().view(torch.uint8).flatten().tolist()) == {0xCD}
        assert not rows[:2].contiguous().view(torch.uint8).any()
