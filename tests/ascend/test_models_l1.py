"""Level 1: what the released Meta kernels answer on device meta, and what they let pass.

The second half states why limits are checked by this project: each call is wrong, each is refused by model and limits, and Meta takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ascend import model_cases_paged  # noqa: F401 - adds cases
from tests.ascend.model_cases import CASES, arguments
from tools.npu_standin import models, schemas

pytestmark = [pytest.mark.wheel, pytest.mark.standin]

META_ONLY = {"npu::npu_format_cast"}
NAMES = sorted(n for n in CASES if n.startswith("npu::") and n not in META_ONLY)


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [_meta(v) for v in value] if isinstance(value, list) else value


def _op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.npu, name.partition("::")[2])


@pytest.mark.parametrize("name", NAMES)
def test_the_legal_call_runs_on_device_meta(name, soc):
    found = _op(name)(**{k: _meta(v) for k, v in arguments(name).items()})
    tensors = [t for t in (found if isinstance(found, (tuple, list)) else [found]) if t is not None]
    assert tensors
    assert all(t.device.type == "meta" for t in tensors)


def test_a_block_of_experts_runs_without_data(soc):
    """Gate, routing, product, activation, product: shapes follow each other under fake tensors of device npu."""
    tokens, width, inner, experts, k = 32, 4096, 2048, 16, 6
    with FakeTensorMode():
        logits = torch.empty(tokens, experts, device="npu")
        weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(logits, k, norm_type=2)
        x = torch.empty(tokens, width, dtype=torch.bfloat16, device="npu")
        rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            x,
            ids,
            active_num=tokens * k,
            expert_num=experts,
            active_expert_range=[0, experts],
            expert_tokens_num_flag=True,
            expert_tokens_num_type=1,
        )
        w13 = torch.empty(experts, width, 2 * inner, dtype=torch.bfloat16, device="npu")
        w2 = torch.empty(experts, inner, width, dtype=torch.bfloat16, device="npu")
        lists = {"group_list": counts, "split_item": 3, "group_type": 0, "group_list_type": 1}
        (h,) = torch.ops.npu.npu_grouped_matmul([rows], [w13], **lists)
        (y,) = torch.ops.npu.npu_grouped_matmul([torch.ops.npu.npu_swiglu(h)], [w2], **lists)
    assert weights.shape == ids.shape == (tokens, k)
    assert ids.dtype == torch.int32
    assert counts.dtype == torch.int64
    assert index.shape == (tokens * k,)
    assert y.shape == (tokens * k, width)
    assert y.device.type == "npu"


PASSES = [
    ("npu::npu_rms_norm", {"gamma": torch.ones(7).bfloat16()}, "gamma of another length"),
    ("npu::npu_moe_gating_top_k", {"k": 300}, "more choices than experts"),
    ("npu::npu_moe_gating_top_k", {"norm_type": 9}, "a score that does not exist"),
    ("npu::npu_dequant_swiglu_quant", {"clamp_limit": float("inf")}, "no finite clamp"),
    ("npu::npu_clipped_swiglu", {"limit": -1.0}, "a negative limit"),
    ("npu::npu_grouped_matmul", {"weight": [torch.ones(4, 65, 96).bfloat16()]}, "another K in x and weight"),
    (
        "npu::npu_transpose_batchmatmul",
        {"input": torch.ones(2, 16, 4096).bfloat16(), "weight": torch.ones(16, 4096, 16).bfloat16()},
        "K*B of Pro",
    ),
    ("npu::npu_moe_init_routing_v2", {"active_expert_range": [0, 99]}, "experts that do not exist"),
]


@pytest.mark.parametrize("name,change,what", PASSES, ids=[what for *_, what in PASSES])
def test_meta_lets_it_pass_and_the_model_does_not(name, change, what, on_chip, soc):
    _op(name)(**{k: _meta(v) for k, v in arguments(name, **change).items()})
    on_chip("910_93")
    with pytest.raises(models.Refused):
        models.MODELS[name](**arguments(name, **change))


def test_defaults_give_other_types_than_v4_wants(soc):
    x = torch.empty(4, 128, dtype=torch.int8, device="meta")
    w, scale = torch.empty(128, 96, dtype=torch.int8, device="meta"), torch.empty(96, device="meta")
    assert torch.ops.npu.npu_quant_matmul(x, w, scale).dtype == torch.int8
    rows = torch.empty(4, 128, dtype=torch.bfloat16, device="meta")
    assert torch.ops.npu.npu_dynamic_mx_quant(rows)[0].shape == (4, 64)
    assert torch.ops.npu.npu_dynamic_block_quant(rows)[0].dtype == torch.int8


def test_fp4_products_count_columns_by_the_width_of_x(soc):
    """[E, K, N/2] and [E, K/2, N] are told apart by x; without x_dtype the first is read with N/2 columns."""
    x = torch.empty(12, 80, dtype=torch.uint8, device="meta")
    lists = {"group_list": torch.empty(4, dtype=torch.int64, device="meta"), "split_item": 3, "group_type": 0, "output_dtype": 15}
    types = {"weight_dtype": 296, "scale_dtype": 293, "per_token_scale_dtype": 293}
    by_output = torch.empty(4, 160, 48, dtype=torch.uint8, device="meta")
    by_input = torch.empty(4, 80, 96, dtype=torch.uint8, device="meta")
    for weight in (by_output, by_input):
        assert torch.ops.npu.npu_grouped_matmul([x], [weight], **lists, **types, x_dtype=296)[0].shape == (12, 96)
    assert torch.ops.npu.npu_grouped_matmul([x], [by_output], **lists, **types)[0].shape == (12, 48)


def test_the_wheel_registers_every_modelled_op(soc):
    registered = torch._C._dispatch_get_all_op_names()
    for name in models.MODELS:
        if name.startswith("npu::"):
            assert name in registered
            assert str(schemas.schema(name)) == str(_op(name).default._schema)
