"""One legal call of every modelled vendor op, in the sizes of V4 where they are small enough: name -> chip -> arguments.

Used to compare models with the wheel's Meta, with the limits, and as the start of calls that must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin import models
from tools.npu_standin.models import cann_functions

Arguments = dict[str, Any]
CASES: dict[str, Callable[[torch.Generator], Arguments]] = {}
BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
E4M3, FP4, E8M0 = 292, 296, 293


def legal(name: str) -> Callable[[Callable[[torch.Generator], Arguments]], Callable[[torch.Generator], Arguments]]:
    def add(make: Callable[[torch.Generator], Arguments]) -> Callable[[torch.Generator], Arguments]:
        CASES[name] = make
        return make

    return add


def arguments(name: str, **changes: Any) -> Arguments:
    """Arguments of the legal call of `name`, some of them replaced."""
    return {**CASES[name](torch.Generator().manual_seed(1)), **changes}


def call(name: str, **changes: Any) -> Any:
    """Run the model of `name` on its legal call, changed; names with a dot are functions without a schema."""
    models.load()
    model = models.MODELS[name] if "::" in name else cann_functions.FUNCTIONS[name.partition(".")[2]]
    return model(**arguments(name, **changes))


def bf16(g: torch.Generator, *shape: int) -> Tensor:
    """Normal values in bf16."""
    return torch.randn(*shape, generator=g).bfloat16()


def fp32(g: torch.Generator, *shape: int) -> Tensor:
    """Normal values in fp32."""
    return torch.randn(*shape, generator=g)


def ints(*values: int, dtype: torch.dtype = INT32) -> Tensor:
    """An integer vector."""
    return torch.tensor(values, dtype=dtype)


def int8(g: torch.Generator, *shape: int) -> Tensor:
    """int8 codes of all sizes."""
    return torch.randint(-127, 128, shape, generator=g).to(torch.int8)


def angles(g: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, 64], every angle twice."""
    theta = torch.randn(rows, 32, generator=g).repeat_interleave(2, 1)
    return theta.cos(), theta.sin()


@legal("npu::npu_rms_norm")
def _rms_norm(g: torch.Generator) -> Arguments:
    return {"input": bf16(g, 5, 512), "gamma": bf16(g, 512), "epsilon": 1e-6}


@legal("custom::npu_rms_norm_dynamic_quant")
def _rms_norm_quant(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 5, 512), "gamma": bf16(g, 512), "epsilon": 1e-6}


def _rope(g: torch.Generator) -> Arguments:
    cos, sin = angles(g, 5)
    return {
        "x": bf16(g, 5, 8, 1, 512),
        "r1": cos[:, None, None],
        "r2": sin[:, None, None],
        "rotary_mode": "interleave",
        "partial_slice": [448, 512],
    }


CASES["custom::inplace_partial_rotary_mul"] = CASES["cann_ops_transformer::inplace_partial_rotary_mul"] = _rope


@legal("npu::npu_rotary_mul")
def _rotary_mul(g: torch.Generator) -> Arguments:
    cos, sin = angles(g, 5)
    return {
        "input": bf16(g, 1, 5, 8, 64),
        "r1": cos.bfloat16()[None, :, None],
        "r2": sin.bfloat16()[None, :, None],
        "rotary_mode": "interleave",
    }


@legal("custom::scatter_nd_update_asc")
def _scatter(g: torch.Generator) -> Arguments:
    return {"var": bf16(g, 64, 512), "indices": ints(3, -1, 60)[:, None], "update": bf16(g, 3, 512)}


@legal("npu::npu_scatter_nd_update_")
def _scatter_wheel(g: torch.Generator) -> Arguments:
    return {"input": bf16(g, 64, 512), "indices": ints(3, 1, 60)[:, None], "updates": bf16(g, 3, 512)}


def _gating(g: torch.Generator) -> Arguments:
    return {
        "x": fp32(g, 7, 256), "k": 6, "bias": fp32(g, 256), "k_group": 1, "group_count": 1, "group_select_mode": 0, "renorm": 0, "norm_type": 2,
        "out_flag": True, "routed_scaling_factor": 1.5, "eps": 1e-20,
    }  # fmt: skip


CASES["npu::npu_moe_gating_top_k"] = CASES["custom::npu_moe_gating_top_k"] = _gating


@legal("npu::npu_moe_init_routing_v2")
def _init_routing(g: torch.Generator) -> Arguments:
    ids = torch.stack([torch.randperm(16, generator=g)[:6] for _ in range(5)]).to(INT32)
    return {
        "x": bf16(g, 5, 256), "expert_idx": ids, "active_num": 30, "expert_capacity": -1, "expert_num": 16, "drop_pad_mode": 0,
        "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1, "active_expert_range": [0, 16], "row_idx_type": 0,
    }  # fmt: skip


@legal("npu::npu_moe_finalize_routing")
def _finalize(g: torch.Generator) -> Arguments:
    return {
        "expanded_permuted_rows": bf16(g, 30, 256), "skip1": None, "skip2": None, "bias": None, "scales": bf16(g, 5, 6),
        "expanded_src_to_dst_row": torch.randperm(30, generator=g).to(INT32), "export_for_source_row": None, "drop_pad_mode": 2,
    }  # fmt: skip


@legal("npu::npu_grouped_matmul")
def _grouped(g: torch.Generator) -> Arguments:
    return {
        "x": [bf16(g, 12, 64)], "weight": [bf16(g, 4, 64, 96)], "group_list": ints(3, 0, 5, 2, dtype=torch.int64), "split_item": 3, "group_type": 0,
        "group_list_type": 1,
    }  # fmt: skip


V4_SWIGLU = {"activate_left": True, "swiglu_mode": 2, "clamp_limit": 10.0, "glu_alpha": 1.0, "glu_bias": 0.0}
"""V4's activation by the wheel's ops; in cann-recipes' own copy the clamped form of halves is mode 1."""


def _dequant_swiglu(g: torch.Generator) -> Arguments:
    return {
        "x": torch.randint(-9999, 9999, (12, 256), generator=g, dtype=INT32), "weight_scale": fp32(g, 4, 256).abs() / 100,
        "activation_scale": fp32(g, 12).abs() / 10, "group_index": ints(3, 0, 5, 2, dtype=torch.int64), "quant_mode": 1, "activate_dim": -1, **V4_SWIGLU,
    }  # fmt: skip


CASES["npu::npu_dequant_swiglu_quant"] = _dequant_swiglu
CASES["custom::npu_dequant_swiglu_clamp_quant"] = lambda g: {**_dequant_swiglu(g), "swiglu_mode": 1}


@legal("npu::npu_clipped_swiglu")
def _clipped(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 12, 256) * 20, "dim": -1, "alpha": 1.0, "limit": 10.0, "bias": 0.0, "interleaved": False}


@legal("npu::npu_swiglu")
def _swiglu(g: torch.Generator) -> Arguments:
    return {"input": bf16(g, 12, 256) * 20, "dim": -1}


@legal("npu::npu_swiglu_mx_quant")
def _swiglu_mx(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 12, 256) * 20, "dst_type": E4M3, "scale_alg": 1, "round_mode": "rint", **V4_SWIGLU}


@legal("custom::npu_hc_pre")
def _hc_pre(g: torch.Generator) -> Arguments:
    fn = fp32(g, 24, 4 * 4096) / 64
    return {
        "x": bf16(g, 3, 4, 4096), "hc_fn": fn, "hc_scale": fp32(g, 3), "hc_base": fp32(g, 24), "hc_mult": 4, "hc_sinkhorn_iters": 20, "norm_eps": 1e-6,
        "hc_eps": 1e-6,
    }  # fmt: skip


@legal("custom::npu_hc_pre_inv_rms")
def _hc_pre_inv_rms(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 3, 4, 4096), "epsilon": 1e-6}


@legal("custom::npu_hc_pre_sinkhorn")
def _hc_pre_sinkhorn(g: torch.Generator) -> Arguments:
    return {
        "mixes": fp32(g, 3, 24), "rsqrt": fp32(g, 3, 1).abs(), "hc_scale": fp32(g, 3), "hc_base": fp32(g, 24), "x": bf16(g, 3, 4, 4096), "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    }  # fmt: skip


@legal("custom::npu_hc_post")
def _hc_post(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 3, 4096), "residual": bf16(g, 3, 4, 4096), "post": fp32(g, 3, 4), "comb": fp32(g, 3, 4, 4)}


@legal("v4_ascend::hc_head")
def _hc_head(g: torch.Generator) -> Arguments:
    fn = fp32(g, 4, 4 * 4096) / 64
    return {"streams": bf16(g, 3, 4, 4096), "fn": fn, "scale": fp32(g, 1), "base": fp32(g, 4), "norm_eps": 1e-6, "hc_eps": 1e-6}


@legal("npu::npu_mhc_post")
def _mhc_post(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 3, 4, 4096), "h_res": fp32(g, 3, 4, 4), "h_out": bf16(g, 3, 4096), "h_post": fp32(g, 3, 4)}


@legal("npu::npu_mhc_pre")
def _mhc_pre(g: torch.Generator) -> Arguments:
    phi = fp32(g, 24, 4 * 4096) / 64
    return {
        "x": bf16(g, 3, 4, 4096),
        "phi": phi,
        "alpha": fp32(g, 3),
        "bias": fp32(g, 24),
        "norm_eps": 1e-6,
        "hc_eps": 1e-6,
        "out_flag": 0,
        "inner_precise": 0,
    }


@legal("npu::npu_mhc_sinkhorn")
def _mhc_sinkhorn(g: torch.Generator) -> Arguments:
    return {"x": fp32(g, 3, 4, 4), "eps": 1e-6, "num_iters": 20, "out_flag": 0}


@legal("npu::npu_dynamic_quant")
def _dynamic_quant(g: torch.Generator) -> Arguments:
    return {"input": bf16(g, 5, 512), "quant_mode": "pertoken", "dst_type": 24 if models.soc() == "950" else None}


@legal("npu::npu_dynamic_block_quant")
def _block_quant(g: torch.Generator) -> Arguments:
    kind = 24 if models.soc() == "950" else 1
    return {
        "x": bf16(g, 5, 512),
        "min_scale": 0.0,
        "round_mode": "rint",
        "dst_type": kind,
        "row_block_size": 1,
        "col_block_size": 128,
    }


@legal("npu::npu_dynamic_mx_quant")
def _mx_quant(g: torch.Generator) -> Arguments:
    return {
        "input": bf16(g, 5, 512), "axis": -1, "round_mode": "rint", "dst_type": E4M3, "block_size": 32, "scale_alg": 1, "dst_type_max": 0.0,
        "max_low_bound": 0.0,
    }  # fmt: skip


@legal("npu::npu_anti_mx_quant")
def _anti_mx(g: torch.Generator) -> Arguments:
    scales = torch.randint(120, 134, (5, 8, 2), generator=g, dtype=torch.uint8)
    return {"x": fp32(g, 5, 512).to(torch.float8_e4m3fn), "mxscale": scales, "axis": -1, "dst_type": 15, "src_type": E4M3}


@legal("npu::npu_format_cast")
def _format_cast(g: torch.Generator) -> Arguments:
    return {"input": bf16(g, 64, 64), "acl_format": 29}


@legal("npu::npu_quant_matmul")
def _quant_matmul(g: torch.Generator) -> Arguments:
    return {
        "x1": int8(g, 5, 128), "x2": int8(g, 96, 128).T, "scale": fp32(g, 96).abs(), "pertoken_scale": fp32(g, 5).abs(), "output_dtype": 15,
    }  # fmt: skip


@legal("npu::npu_transpose_batchmatmul")
def _transpose_bmm(g: torch.Generator) -> Arguments:
    return {
        "input": bf16(g, 5, 8, 256),
        "weight": bf16(g, 8, 256, 64),
        "perm_x1": [1, 0, 2],
        "perm_x2": [0, 1, 2],
        "perm_y": [1, 0, 2],
    }


@legal("npu::npu_moe_re_routing")
def _re_routing(g: torch.Generator) -> Arguments:
    counts = ints(2, 0, 1, 1, 3, 0, dtype=torch.int64).view(2, 3)
    return {
        "tokens": bf16(g, 10, 64),
        "expert_token_num_per_rank": counts,
        "per_token_scales": fp32(g, 10),
        "expert_token_num_type": 1,
        "idx_type": 0,
    }


@legal("custom::npu_swiglu_group_quant")
def _swiglu_group(g: torch.Generator) -> Arguments:
    return {
        "x": bf16(g, 12, 512) * 20, "group_index": ints(3, 0, 5, 2, dtype=torch.int64), "dst_type": torch.float8_e4m3fn, "quant_mode": 1,
        "round_scale": True, "clamp_limit": 10.0, "output_origin": True,
    }  # fmt: skip


@legal("npu::npu_grouped_matmul_swiglu_quant_v2")
def _grouped_swiglu(g: torch.Generator) -> Arguments:
    return {
        "x": int8(g, 12, 64), "weight": [int8(g, 4, 64, 128)], "weight_scale": [fp32(g, 4, 128).abs() / 100], "x_scale": fp32(g, 12).abs(),
        "group_list": ints(3, 3, 8, 10, dtype=torch.int64),
    }  # fmt: skip


@legal("npu::npu_rms_norm_dynamic_mx_quant")
def _rms_norm_mx(g: torch.Generator) -> Arguments:
    return {"x": bf16(g, 5, 512), "gamma": bf16(g, 512), "epsilon": 1e-6, "scale_alg": 1, "round_mode": "rint", "dst_type": E4M3}


@legal("npu::npu_moe_token_permute")
def _token_permute(g: torch.Generator) -> Arguments:
    return {"tokens": bf16(g, 5, 64), "indices": torch.randint(0, 9, (5, 6), generator=g)}


@legal("npu::npu_moe_token_unpermute")
def _token_unpermute(g: torch.Generator) -> Arguments:
    return {
        "permuted_tokens": bf16(g, 30, 64),
        "sorted_indices": torch.randperm(30, generator=g).to(INT32),
        "probs": bf16(g, 5, 6),
    }
