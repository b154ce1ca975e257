"""Other legal calls of the same ops: quantised types and switches that change the outputs. (name, chips, make): make returns changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ascend.model_cases import E8M0, FP4, INT32, Arguments, fp32, int8

OLDER, NEWER, ALL = ("910b", "910_93"), ("950",), ("910b", "910_93", "950")
VARIANTS: dict[str, tuple[str, tuple[str, ...], Callable[[torch.Generator], Arguments]]] = {}


def _add(name: str, what: str, chips: tuple[str, ...], make: Callable[[torch.Generator], Arguments]) -> None:
    VARIANTS[f"{name.rpartition(':')[2]}-{what}"] = (name, chips, make)


def e4m3(g: torch.Generator, *shape: int) -> Tensor:
    """Normal values in e4m3."""
    return fp32(g, *shape).to(torch.float8_e4m3fn)


def codes(g: torch.Generator, *shape: int) -> Tensor:
    """Bytes of any value: two fp4 codes each."""
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def powers(g: torch.Generator, *shape: int) -> Tensor:
    """e8m0 bytes around 1."""
    return torch.randint(124, 131, shape, generator=g, dtype=torch.uint8)


ROUTING, GROUPED, MATMUL = "npu::npu_moe_init_routing_v2", "npu::npu_grouped_matmul", "npu::npu_quant_matmul"
_add(ROUTING, "int8", ALL, lambda g: {"quant_mode": 1})
_add(ROUTING, "mxfp8", NEWER, lambda g: {"quant_mode": 3})
_add(ROUTING, "mxfp4", NEWER, lambda g: {"quant_mode": 9})
_add(ROUTING, "scatter", ALL, lambda g: {"row_idx_type": 1})
_add(ROUTING, "part", ALL, lambda g: {"active_expert_range": [4, 9]})
_add(ROUTING, "cumulative", ALL, lambda g: {"expert_tokens_num_type": 0})
_add(ROUTING, "pairs", ALL, lambda g: {"expert_tokens_num_type": 2})
_add("npu::npu_moe_gating_top_k", "hash", ALL, lambda g: {
    "input_ids": torch.randint(0, 11, (7,), generator=g), "tid2eid": torch.randint(0, 256, (11, 6), generator=g, dtype=INT32), "bias": None})  # fmt: skip
_add("npu::npu_moe_gating_top_k", "bf16", ALL, lambda g: {"x": fp32(g, 7, 256).bfloat16(), "bias": None})
_add("npu::npu_moe_finalize_routing", "columns", ALL, lambda g: {"drop_pad_mode": 0})
_add(GROUPED, "w8a8", ALL, lambda g: {
    "x": [int8(g, 12, 64)], "weight": [int8(g, 4, 64, 96)], "scale": [fp32(g, 4, 96).bfloat16()], "per_token_scale": [fp32(g, 12)],
    "output_dtype": 15})  # fmt: skip
_add(GROUPED, "int32", ALL, lambda g: {"x": [int8(g, 12, 64)], "weight": [int8(g, 4, 64, 96)], "output_dtype": 3})
_add(GROUPED, "cumulative", ALL, lambda g: {"group_list": torch.tensor([3, 3, 8, 10]), "group_list_type": 0})
_add(GROUPED, "mxfp8", NEWER, lambda g: {
    "x": [e4m3(g, 12, 160)], "weight": [e4m3(g, 4, 160, 96)], "scale": [powers(g, 4, 3, 96, 2)], "per_token_scale": [powers(g, 12, 3, 2)],
    "scale_dtype": E8M0, "per_token_scale_dtype": E8M0, "output_dtype": 15})  # fmt: skip
_add(GROUPED, "w4a8", NEWER, lambda g: {
    "x": [e4m3(g, 12, 160)], "weight": [codes(g, 4, 96, 80).transpose(1, 2)], "antiquant_scale": [powers(g, 4, 96, 3, 2).transpose(1, 2)],
    "per_token_scale": [powers(g, 12, 3, 2)], "weight_dtype": FP4, "per_token_scale_dtype": E8M0, "output_dtype": 15, "tuning_config": [0]})  # fmt: skip
_add(GROUPED, "w4a4", NEWER, lambda g: {
    "x": [codes(g, 12, 80)], "weight": [codes(g, 4, 160, 48)], "scale": [powers(g, 4, 3, 96, 2)], "per_token_scale": [powers(g, 12, 3, 2)],
    "x_dtype": FP4, "weight_dtype": FP4, "scale_dtype": E8M0, "per_token_scale_dtype": E8M0, "output_dtype": 15})  # fmt: skip
_add(GROUPED, "w4a4 as stored", NEWER, lambda g: {
    "x": [codes(g, 12, 80)], "weight": [codes(g, 4, 96, 80).transpose(1, 2)], "scale": [powers(g, 4, 96, 3, 2).transpose(1, 2)],
    "per_token_scale": [powers(g, 12, 3, 2)], "x_dtype": FP4, "weight_dtype": FP4, "scale_dtype": E8M0, "per_token_scale_dtype": E8M0,
    "output_dtype": 15})  # fmt: skip
_add("npu::npu_dynamic_mx_quant", "fp4", NEWER, lambda g: {"dst_type": FP4})
_add("npu::npu_anti_mx_quant", "fp4", NEWER, lambda g: {"x": codes(g, 5, 256), "src_type": FP4})
_add("npu::npu_swiglu_mx_quant", "fp4", NEWER, lambda g: {"dst_type": FP4})
_add(
    "npu::npu_dequant_swiglu_quant",
    "bf16",
    ALL,
    lambda g: {"x": fp32(g, 12, 256).bfloat16(), "weight_scale": None, "activation_scale": None},
)
_add("npu::npu_dequant_swiglu_quant", "fp8", NEWER, lambda g: {"dst_type": 24})
_add("npu::npu_lightning_indexer", "no values", ALL, lambda g: {"return_value": False})
_add(MATMUL, "no row scale", ALL, lambda g: {"pertoken_scale": None})
_add(MATMUL, "mxfp8", NEWER, lambda g: {
    "x1": e4m3(g, 5, 128), "x2": e4m3(g, 96, 128).T, "scale": powers(g, 96, 2, 2).transpose(0, 1), "pertoken_scale": powers(g, 5, 2, 2),
    "scale_dtype": E8M0, "pertoken_scale_dtype": E8M0, "group_sizes": [1, 1, 32]})  # fmt: skip
_add(MATMUL, "fp8 blocks", NEWER, lambda g: {
    "x1": e4m3(g, 5, 128), "x2": e4m3(g, 96, 128).T, "scale": fp32(g, 1, 1), "pertoken_scale": fp32(g, 5, 1), "group_sizes": [1, 128, 128]})  # fmt: skip
_add("npu::npu_dynamic_block_quant", "128 x 128", NEWER, lambda g: {"row_block_size": 128})
_add("npu::npu_rms_norm", "fp32", ALL, lambda g: {"input": fp32(g, 2, 3, 64), "gamma": fp32(g, 64)})
