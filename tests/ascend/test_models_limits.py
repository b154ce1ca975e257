"""Models and contracts.yaml say the same: legal calls pass both, calls outside a documented limit are refused by both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.ascend import limits
from tests.ascend import model_cases_paged  # noqa: F401 - adds cases
from tests.ascend.model_cases import CASES, arguments, call
from tests.ascend.model_variants import VARIANTS
from tools.npu_standin import models, schemas

pytestmark = pytest.mark.standin


def _check(name: str, chip: str, passed: dict[str, Any]) -> None:
    entry = limits.limits()[name]
    schema = torch._C.parse_schema(f"f::{entry.schema}") if entry.schema else schemas.schema(name)
    limits.check(name, passed, {a.name: a.default_value for a in schema.arguments if a.has_default_value()}, chip)


# metadata cases come into being with the calls that they are for
@pytest.mark.parametrize("chip", models.SOCS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_legal_call_is_legal_for_both(name, chip, on_chip):
    on_chip(chip)
    if chip in limits.limits()[name].chips:
        _check(name, chip, arguments(name))
        call(name)
    else:
        with pytest.raises(models.Refused, match="no kernel"):
            call(name)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_variant_is_legal_for_both(variant, on_chip):
    name, chips, make = VARIANTS[variant]
    for chip in chips:
        on_chip(chip)
        changes = make(torch.Generator().manual_seed(2))
        _check(name, chip, arguments(name, **changes))
        call(name, **changes)


def test_every_model_has_a_legal_call():
    for chip in models.SOCS:
        before = models.soc()
        models.set_soc(chip)
        for name in list(CASES):
            if chip in limits.limits()[name].chips:
                arguments(name)
        models.set_soc(before)
    of_their_own = {"npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"}
    unused = {"custom::kv_compress_epilog", "custom::indexer_compress_epilog"}
    assert set(models.MODELS) - set(CASES) == of_their_own | unused


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(*shape).bfloat16()


def fp32(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("npu::npu_rms_norm", {"gamma": bf16(511)}),
    ("npu::npu_rms_norm", {"input": torch.ones(5, 512).double()}),
    ("custom::npu_rms_norm_dynamic_quant", {"x": bf16(1, 5, 512)}),
    ("custom::inplace_partial_rotary_mul", {"x": bf16(5, 8, 512)}),
    ("custom::inplace_partial_rotary_mul", {"rotary_mode": "half"}),
    ("custom::inplace_partial_rotary_mul", {"r1": fp32(5, 1, 1, 32), "r2": fp32(5, 1, 1, 32)}),
    ("custom::inplace_partial_rotary_mul", {"r1": fp32(1, 1, 1, 64), "r2": fp32(1, 1, 1, 64)}),
    ("custom::inplace_partial_rotary_mul", {"x": bf16(5, 8, 1, 1024)[..., :512]}),
    ("custom::inplace_partial_rotary_mul", {"x": bf16(5, 8, 1, 1026)}),
    ("npu::npu_rotary_mul", {"input": bf16(250, 4, 2, 64), "r1": bf16(250, 1, 2, 64), "r2": bf16(250, 1, 2, 64)}),
    ("npu::npu_rotary_mul", {"input": bf16(1, 5, 8, 896), "r1": bf16(1, 5, 1, 896), "r2": bf16(1, 5, 1, 896)}),
    ("custom::scatter_nd_update_asc", {"var": bf16(4, 16, 512)}),
    ("custom::scatter_nd_update_asc", {"var": bf16(64, 256), "update": bf16(3, 256)}),
    ("custom::scatter_nd_update_asc", {"var": fp32(64, 512), "update": fp32(3, 512)}),
    ("custom::scatter_nd_update_asc", {"indices": torch.tensor([[1], [2], [64]]).int()}),
    ("custom::scatter_nd_update_asc", {"var": bf16(2, 512)}),
    ("npu::npu_scatter_nd_update_", {"indices": torch.tensor([[1], [-1], [2]]).int()}),
    ("npu::npu_moe_gating_top_k", {"bias": bf16(256)}),
    ("npu::npu_moe_gating_top_k", {"bias": fp32(255)}),
    ("npu::npu_moe_gating_top_k", {"k": 65}),
    ("npu::npu_moe_gating_top_k", {"norm_type": 3}),
    ("npu::npu_moe_gating_top_k", {"renorm": 1}),
    ("npu::npu_moe_gating_top_k", {"group_count": 2}),
    ("npu::npu_moe_gating_top_k", {"input_ids": torch.zeros(7).long()}),
    ("npu::npu_moe_gating_top_k", {"input_ids": torch.zeros(7).long(), "tid2eid": torch.zeros(3, 6).long()}),
    ("npu::npu_moe_gating_top_k", {"input_ids": torch.full((7,), 3), "tid2eid": torch.zeros(3, 6).int()}),
    ("npu::npu_moe_gating_top_k", {"x": fp32(7, 2049), "bias": fp32(2049)}),
    ("custom::npu_moe_gating_top_k", {"x": fp32(0, 256)}),
    ("custom::npu_moe_gating_top_k", {"input_ids": torch.zeros(7).int(), "tid2eid": torch.zeros(3, 6).int()}),
    ("npu::npu_moe_init_routing_v2", {"active_num": -1}),
    ("npu::npu_moe_init_routing_v2", {"active_expert_range": []}),
    ("npu::npu_moe_init_routing_v2", {"active_expert_range": [0, 17]}),
    ("npu::npu_moe_init_routing_v2", {"expert_num": 15, "active_expert_range": [0, 15]}),
    ("npu::npu_moe_init_routing_v2", {"expert_idx": torch.zeros(5, 6).long()}),
    ("npu::npu_moe_init_routing_v2", {"quant_mode": 3}),
    ("npu::npu_moe_init_routing_v2", {"row_idx_type": 2}),
    ("npu::npu_moe_finalize_routing", {"scales": fp32(5, 6).half()}),
    ("npu::npu_moe_finalize_routing", {"skip2": bf16(5, 256)}),
    ("npu::npu_moe_finalize_routing", {"expanded_src_to_dst_row": torch.full((30,), -1).int()}),
    ("npu::npu_grouped_matmul", {"group_type": None}),
    ("npu::npu_grouped_matmul", {"split_item": 0}),
    ("npu::npu_grouped_matmul", {"group_list": torch.tensor([3, 0, 5, 2]).int()}),
    ("npu::npu_grouped_matmul", {"group_list": torch.tensor([3, 0, 5, 2]), "group_list_type": 0}),
    ("npu::npu_grouped_matmul", {"group_list": torch.tensor([3, 0, 5, 20])}),
    ("npu::npu_grouped_matmul", {"weight": [bf16(4, 65, 96)]}),
    (
        "npu::npu_grouped_matmul",
        {"x": [bf16(12, 64).to(torch.float8_e4m3fn)], "weight": [bf16(4, 64, 96).to(torch.float8_e4m3fn)]},
    ),
    ("npu::npu_dequant_swiglu_quant", {"clamp_limit": float("inf")}),
    ("npu::npu_dequant_swiglu_quant", {"clamp_limit": 0.0}),
    ("npu::npu_dequant_swiglu_quant", {"weight_scale": None}),
    ("npu::npu_dequant_swiglu_quant", {"x": torch.zeros(12, 192).int(), "weight_scale": fp32(4, 192)}),
    ("npu::npu_dequant_swiglu_quant", {"group_index": torch.tensor([3, 0, 5, 20])}),
    ("npu::npu_dequant_swiglu_quant", {"dst_type": 24}),
    ("npu::npu_clipped_swiglu", {"limit": float("inf")}),
    ("custom::npu_hc_pre", {"x": bf16(3, 4, 2048), "hc_fn": fp32(24, 8192)}),
    ("custom::npu_hc_pre", {"x": bf16(0, 4, 4096)}),
    ("custom::npu_hc_pre", {"x": fp32(3, 4, 4096)}),
    ("custom::npu_hc_post", {"residual": bf16(0, 4, 4096), "x": bf16(0, 4096), "post": fp32(0, 4), "comb": fp32(0, 4, 4)}),
    ("custom::npu_hc_post", {"x": fp32(3, 4096)}),
    ("custom::npu_hc_post", {"comb": fp32(3, 4, 4).bfloat16()}),
    ("npu::npu_mhc_post", {"x": bf16(3, 5, 64), "h_res": fp32(3, 5, 5), "h_out": bf16(3, 64), "h_post": fp32(3, 5)}),
    ("npu::npu_mhc_pre", {"alpha": fp32(1)}),
    ("v4_ascend::hc_head", {"streams": bf16(3, 4, 4000), "fn": fp32(4, 16000)}),
    ("v4_ascend::hc_head", {"streams": bf16(0, 4, 4096)}),
    ("v4_ascend::hc_head", {"streams": bf16(3, 2, 4096)}),
    ("v4_ascend::hc_head", {"scale": fp32(3)}),
    ("v4_ascend::hc_head", {"base": bf16(4)}),
    ("v4_ascend::hc_head", {"fn": fp32(4 * 4096, 4).T}),
    ("v4_ascend::hc_head", {"norm_eps": float("nan")}),
    ("v4_ascend::hc_head", {"hc_eps": -1e-6}),
    ("npu::npu_dynamic_block_quant", {"dst_type": 24}),
    ("npu::npu_dynamic_quant", {"input": fp32(5, 512)}),
    ("npu::npu_dynamic_quant", {"dst_type": 24}),
    ("npu::npu_quant_matmul", {"output_dtype": None}),
    ("npu::npu_quant_matmul", {"pertoken_scale": bf16(5)}),
    ("npu::npu_quant_matmul", {"x1": bf16(5, 128), "x2": bf16(128, 96)}),
    ("npu::npu_transpose_batchmatmul", {"input": bf16(2, 16, 4096), "weight": bf16(16, 4096, 16)}),
    ("npu::npu_transpose_batchmatmul", {"input": bf16(2, 8, 100), "weight": bf16(8, 100, 16)}),
    ("custom::compressor", {"rotary_mode": 1}),
    ("custom::compressor", {"cache_mode": 2}),
    ("custom::compressor", {"coff": 1}),
    ("custom::compressor", {"norm_weight": bf16(512)}),
    ("custom::compressor", {"x": bf16(10, 5000), "wkv": bf16(1024, 5000), "wgate": bf16(1024, 5000)}),
    ("custom::compressor", {"x": bf16(10, 7168), "wkv": bf16(1024, 7168), "wgate": bf16(1024, 7168), "seqused": None}),
    ("custom::compressor", {"rope_sin": fp32(10, 64), "rope_cos": fp32(10, 64)}),
    ("custom::compressor", {"cu_seqlens": None}),
    ("custom::compressor", {"state_block_table": torch.full((3, 20), 99).int()}),
    ("custom::npu_quant_lightning_indexer", {"metadata": None}),
    ("custom::npu_quant_lightning_indexer", {"sparse_count": 2049}),
    ("custom::npu_quant_lightning_indexer", {"cmp_ratio": 3}),
    ("custom::npu_quant_lightning_indexer", {"query": torch.ones(10, 32, 128).to(torch.int8)}),
    ("custom::npu_quant_lightning_indexer", {"weights": fp32(10, 64)}),
    ("custom::npu_quant_lightning_indexer", {"return_value": True}),
    ("custom::npu_sparse_attn_sharedkv", {"metadata": None}),
    ("custom::npu_sparse_attn_sharedkv", {"sinks": None}),
    ("custom::npu_sparse_attn_sharedkv", {"q": bf16(10, 128, 512), "sinks": fp32(128)}),
    ("custom::npu_sparse_attn_sharedkv", {"cmp_sparse_indices": torch.full((10, 1, 1024), -1).int()}),
    ("custom::npu_sparse_attn_sharedkv", {"cmp_ratio": 8}),
    ("custom::npu_sparse_attn_sharedkv", {"layout_kv": "PA_BBND"}),
    ("custom::npu_sparse_attn_sharedkv", {"ori_kv": bf16(61, 24, 1, 512)}),
    ("custom::npu_sparse_attn_sharedkv", {"ori_kv": fp32(61, 16, 1, 512)}),
    ("cann_ops_transformer::sparse_flash_mla", {"q": bf16(10, 96, 512), "sinks": fp32(96)}),
    ("cann_ops_transformer::sparse_flash_mla", {"cmp_residual_kv": None}),
    ("cann_ops_transformer.lightning_indexer", {"cmp_residual_k": None}),
    ("cann_ops_transformer.lightning_indexer", {"w": bf16(10, 64)}),
    ("cann_ops_transformer.lightning_indexer", {"topk": 4096}),
]


@pytest.mark.parametrize(
    "name,change", WRONG, ids=[f"{name.rpartition(':')[2]}-{'-'.join(change)}-{i}" for i, (name, change) in enumerate(WRONG)]
)
def test_a_call_outside_the_limits_is_refused_by_both(name, change, on_chip):
    on_chip("910_93")
    passed = arguments(name, **change)
    with pytest.raises(models.Refused):
        call(name, **change)
    with pytest.raises(limits.LimitError):
        _check(name, "910_93", passed)


def _mx_product(**changes: Any) -> dict[str, Any]:
    return {**VARIANTS["npu_quant_matmul-mxfp8"][2](torch.Generator().manual_seed(2)), **changes}


NEWER: list[tuple[str, dict[str, Any]]] = [
    ("npu::npu_quant_matmul", _mx_product(scale=torch.full((2, 96, 2), 127, dtype=torch.uint8))),
    ("npu::npu_quant_matmul", _mx_product(group_sizes=None)),
    ("npu::npu_grouped_matmul", {**VARIANTS["npu_grouped_matmul-w4a4"][2](torch.Generator().manual_seed(2)), "x_dtype": None}),
    ("npu::npu_dynamic_mx_quant", {"block_size": 16}),
    ("npu::npu_dynamic_mx_quant", {"dst_type": 1}),
    ("npu::npu_swiglu_mx_quant", {"clamp_limit": float("inf")}),
    ("npu::npu_dynamic_block_quant", {"dst_type": 1}),
    ("custom::npu_kv_quant_sparse_attn_sharedkv", {"kv_quant_mode": 0}),
    ("custom::npu_kv_quant_sparse_attn_sharedkv", {"tile_size": 128}),
    ("custom::npu_hc_pre", {"x": bf16(513, 4, 4096)}),
    ("cann_ops_transformer::sparse_flash_mla", {"q": bf16(10, 1, 512), "sinks": fp32(1)}),
]


@pytest.mark.parametrize(
    "name,change", NEWER, ids=[f"{name.rpartition(':')[2]}-{'-'.join(change)}-{i}" for i, (name, change) in enumerate(NEWER)]
)
def test_a_call_outside_the_limits_of_950_is_refused_by_both(name, change, on_chip):
    on_chip("950")
    passed = arguments(name, **change)
    with pytest.raises(models.Refused):
        call(name, **change)
    with pytest.raises(limits.LimitError):
        _check(name, "950", passed)


EXPLICIT = [(name, keyword) for name, entry in sorted(limits.limits().items()) for keyword in entry.explicit if name in CASES]


@pytest.mark.parametrize("name,keyword", EXPLICIT)
def test_a_keyword_left_to_the_vendors_default_is_refused(name, keyword, on_chip):
    chip = next(c for c in models.SOCS if c in limits.limits()[name].chips)
    on_chip(chip)
    passed = {key: value for key, value in arguments(name).items() if key != keyword}
    with pytest.raises(limits.LimitError, match="vendor's default"):
        _check(name, chip, passed)
