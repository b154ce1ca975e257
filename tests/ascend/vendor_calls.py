"""Legal calls of vendor ops with random operands, one list for all chips; each says which chips its op is documented for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OLDER, NEW, ALL = ("910b", "910_93"), ("950",), ("910b", "910_93", "950")
T, H, N, E, K = 6, 256, 64, 8, 2
BF16, F32, I8, I32, I64, U8 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64, torch.uint8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACL_BF16, ACL_E4M3, ACL_E8M0, ACL_FP4 = 283, 292, 293, 296


@dataclass(frozen=True)
class VendorCall:
    """One call: op, operands, and what reaches the kernel. `undefined`: outputs that the op leaves undefined in this call."""

    id: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    socs: tuple[str, ...] = ALL
    aclnn: str = ""
    undefined: tuple[int, ...] = ()


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def ints(self, *shape: int, low: int = -127, high: int = 128, dtype: torch.dtype = I8) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def powers(self, *shape: int) -> Tensor:
        return self.ints(*shape, low=118, high=130, dtype=U8)

    def choice(self, rows: int, of: int, k: int) -> Tensor:
        return torch.stack([torch.randperm(of, generator=self.generator)[:k] for _ in range(rows)]).to(I32)


GATE = {
    "norm_type": 2, "routed_scaling_factor": 1.5, "eps": 1e-20, "k_group": 1, "group_count": 1, "group_select_mode": 0, "renorm": 0,
    "out_flag": True,
}  # fmt: skip
GROUPED = {"split_item": 2, "group_type": 0, "group_list_type": 1}
ACT = {"activate_left": True, "swiglu_mode": 2, "clamp_limit": 2.0, "glu_alpha": 1.0, "glu_bias": 0.0}
MX = {"scale_dtype": ACL_E8M0, "pertoken_scale_dtype": ACL_E8M0, "group_sizes": [1, 1, 32], "output_dtype": BF16}
MXG = dict(scale_dtype=ACL_E8M0, per_token_scale_dtype=ACL_E8M0, output_dtype=BF16, **GROUPED)
COUNTS = torch.tensor([1, 0, 2, 1, 0, 0, 1, 1])


def _routing(d: _Draw) -> dict[str, Any]:
    return {
        "active_num": T * K, "expert_capacity": -1, "expert_num": E, "drop_pad_mode": 0, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
        "active_expert_range": [0, E], "row_idx_type": 0,
    }  # fmt: skip


def norms(d: _Draw) -> list[VendorCall]:
    cos, sin = (d.normal(2, 1, 1, 64) for _ in range(2))
    streams = (d.normal(T, 4, H), d.normal(T, 4, 4, dtype=F32), d.normal(T, H), d.normal(T, 4, dtype=F32))
    pre = (d.normal(T, 4, H), d.normal(24, 4 * H, dtype=F32), d.normal(3, dtype=F32), d.normal(24, dtype=F32))
    return [
        VendorCall("norm", "npu::npu_rms_norm", (d.normal(T, H), d.normal(H)), {"epsilon": 1e-3}, aclnn="aclnnRmsNorm"),
        VendorCall("norm-fp32", "npu::npu_rms_norm", (d.normal(T, H, dtype=F32), d.normal(H, dtype=F32)), {"epsilon": 1e-6}, aclnn="aclnnRmsNorm"),
        VendorCall("rope", "npu::npu_rotary_mul", (d.normal(2, 1, 4, 64), cos, sin), {"rotary_mode": "interleave"},
                   aclnn="aclnnRotaryPositionEmbeddingV2"),
        VendorCall("mhc-post", "npu::npu_mhc_post", streams, aclnn="aclnnMhcPost"),
        VendorCall("mhc-pre", "npu::npu_mhc_pre", pre, {"norm_eps": 1e-6, "hc_eps": 1e-5, "inner_precise": 0}, NEW, "aclnnMhcPreV2"),
        VendorCall("norm-mxfp8", "npu::npu_rms_norm_dynamic_mx_quant", (d.normal(T, H), d.normal(H)),
                   {"epsilon": 1e-3, "scale_alg": 1, "round_mode": "rint", "dst_type": ACL_E4M3}, NEW, "aclnnRmsNormDynamicMxQuant", undefined=(2,)),
        VendorCall("sinkhorn", "npu::npu_mhc_sinkhorn", (d.normal(T, 4, 4, dtype=F32),), {"eps": 2**-20, "num_iters": 20}, aclnn="aclnnMhcSinkhorn"),
    ]  # fmt: skip


def quants(d: _Draw) -> list[VendorCall]:
    x = d.normal(T, H)
    e4m3, scales = d.normal(T, H).to(E4M3), d.powers(T, H // 64, 2)
    mx = {"axis": -1, "round_mode": "rint", "block_size": 32}
    return [
        VendorCall("int8", "npu::npu_dynamic_quant", (x,), {"dst_type": I8}, aclnn="aclnnDynamicQuantV2"),
        VendorCall("int8-smooth", "npu::npu_dynamic_quant", (x,), {"smooth_scales": d.normal(H), "dst_type": I8}, aclnn="aclnnDynamicQuantV2"),
        VendorCall("fp8", "npu::npu_dynamic_quant", (x,), {"dst_type": E4M3}, NEW, aclnn="aclnnDynamicQuantV2"),
        VendorCall("block-int8", "npu::npu_dynamic_block_quant", (x,), {"dst_type": 1}, OLDER, aclnn="aclnnDynamicBlockQuantV2"),
        VendorCall("block-fp8", "npu::npu_dynamic_block_quant", (x,), {"dst_type": ACL_E4M3, "min_scale": 0.25}, NEW, "aclnnDynamicBlockQuantV2"),
        VendorCall("mxfp8", "npu::npu_dynamic_mx_quant", (x,), dict(dst_type=ACL_E4M3, scale_alg=1, **mx), NEW, "aclnnDynamicMxQuantV3"),
        VendorCall("mxfp4", "npu::npu_dynamic_mx_quant", (x,), dict(dst_type=ACL_FP4, scale_alg=0, **mx), NEW, "aclnnDynamicMxQuantV3"),
        VendorCall("from-mxfp8", "npu::npu_anti_mx_quant", (e4m3, scales), {"dst_type": 15, "src_type": ACL_E4M3}, NEW, "aclnnAntiMxQuant"),
        VendorCall("from-mxfp4", "npu::npu_anti_mx_quant", (d.ints(T, H // 2, low=0, high=256, dtype=U8), scales),
                   {"dst_type": 15, "src_type": ACL_FP4}, NEW, "aclnnAntiMxQuant"),
    ]  # fmt: skip


def products(d: _Draw) -> list[VendorCall]:
    x8, w8 = d.ints(T, H), d.ints(N, H).t()
    rows, columns = d.normal(T, dtype=F32).abs(), d.normal(N, dtype=F32)
    mx_rows, mx_columns = d.powers(T, H // 64, 2), d.powers(N, H // 64, 2).transpose(0, 1)
    fp4 = [d.ints(n, H // 2, low=0, high=256, dtype=U8) for n in (T, N)]
    blocks = d.normal(N // N, H // 128, dtype=F32).t()
    perms = {"perm_x1": [1, 0, 2], "perm_x2": [0, 1, 2], "perm_y": [1, 0, 2]}
    matmul = "aclnnQuantMatmulV5"
    return [
        VendorCall("w8a8", "npu::npu_quant_matmul", (x8, w8, columns), {"pertoken_scale": rows, "output_dtype": BF16}, aclnn=matmul),
        VendorCall("w8a8-one", "npu::npu_quant_matmul", (x8, w8, columns.bfloat16()), {"output_dtype": BF16}, aclnn=matmul),
        VendorCall("w8a8-fp16", "npu::npu_quant_matmul", (x8, w8, columns), {"pertoken_scale": rows, "output_dtype": torch.float16}, aclnn=matmul),
        VendorCall("mm-mxfp8", "npu::npu_quant_matmul", (d.normal(T, H).to(E4M3), d.normal(N, H).to(E4M3).t(), mx_columns),
                   dict(pertoken_scale=mx_rows, **MX), NEW, matmul),
        VendorCall("mm-mxfp4", "npu::npu_quant_matmul", (fp4[0], fp4[1].t(), mx_columns),
                   dict(pertoken_scale=mx_rows, x1_dtype=ACL_FP4, x2_dtype=ACL_FP4, **MX), NEW, matmul),
        VendorCall("mm-fp8-blocks", "npu::npu_quant_matmul", (d.normal(T, H).to(E4M3), d.normal(N, H).to(E4M3).t(), blocks),
                   {"pertoken_scale": d.normal(T, H // 128, dtype=F32), "group_sizes": [1, 128, 128], "output_dtype": BF16}, NEW, matmul),
        VendorCall("batched", "npu::npu_transpose_batchmatmul", (d.normal(T, 8, H), d.normal(8, H, N)), perms, aclnn="aclnnTransposeBatchMatMul"),
    ]  # fmt: skip


def grouped(d: _Draw) -> list[VendorCall]:
    op, lists = "npu::npu_grouped_matmul", dict(group_list=COUNTS, **GROUPED)
    mx = dict(per_token_scale=[d.powers(T, H // 64, 2)], group_list=COUNTS, **MXG)
    weights4 = d.ints(E, N, H // 2, low=0, high=256, dtype=U8)
    scales = d.powers(E, N, H // 64, 2).transpose(1, 2)
    x8, w8 = [d.ints(T, H)], [d.ints(E, H, N)]
    return [
        VendorCall("experts", op, ([d.normal(T, H)], [d.normal(E, H, N)]), lists),
        VendorCall("experts-view", op, ([d.normal(T, H)], [d.normal(E, N, H).transpose(1, 2)]), lists),
        VendorCall("experts-sums", op, ([d.normal(T, H)], [d.normal(E, H, N)]), {**lists, "group_list_type": 0, "group_list": COUNTS.cumsum(0)}),
        VendorCall("experts-w8a8", op, (x8, w8), dict(scale=[d.normal(E, N)], per_token_scale=[d.normal(T, dtype=F32)], output_dtype=BF16, **lists)),
        VendorCall("experts-int32", op, (x8, w8), dict(output_dtype=I32, **lists)),
        VendorCall("experts-w4a8", op, ([d.normal(T, H).to(E4M3)], [weights4.transpose(1, 2)]),
                   dict(antiquant_scale=[scales], weight_dtype=ACL_FP4, tuning_config=[0], **{k: v for k, v in mx.items() if k != "scale_dtype"}), NEW),
        VendorCall("experts-w4a4", op, ([d.ints(T, H // 2, low=0, high=256, dtype=U8)], [d.ints(E, H, N // 2, low=0, high=256, dtype=U8)]),
                   dict(scale=[d.powers(E, H // 64, N, 2)], x_dtype=ACL_FP4, weight_dtype=ACL_FP4, **mx), NEW),
    ]  # fmt: skip


def routing(d: _Draw) -> list[VendorCall]:
    logits, ids, x = d.normal(T, E, dtype=F32), d.choice(T, E, K), d.normal(T, H)
    table, tokens = d.choice(100, E, K), d.ints(T, low=0, high=100, dtype=I64)
    order = torch.randperm(T * K, generator=d.generator).to(I32)
    rows, weights = d.normal(T * K, H), d.normal(T, K)
    sum_up, gate = "npu::npu_moe_finalize_routing", "npu::npu_moe_gating_top_k"
    return [
        VendorCall("gate", gate, (logits, K), dict(bias=d.normal(E, dtype=F32), **GATE), aclnn="aclnnMoeGatingTopK"),
        VendorCall("gate-hash", gate, (logits, K), dict(input_ids=tokens, tid2eid=table, **GATE), aclnn="aclnnMoeGatingTopKV2"),
        VendorCall("sort", "npu::npu_moe_init_routing_v2", (x, ids), dict(quant_mode=-1, **_routing(d)), aclnn="aclnnMoeInitRoutingV3", undefined=(3,)),
        VendorCall("sort-codes-int8", "npu::npu_moe_init_routing_v2", (d.ints(T, H), ids),
                   dict(scale=d.normal(T, dtype=F32), quant_mode=-1, **_routing(d)), aclnn="aclnnMoeInitRoutingV3"),
        VendorCall("sort-codes-mxfp8", "npu::npu_moe_init_routing_v2", (d.normal(T, H).to(E4M3), ids),
                   dict(scale=d.powers(T, H // 64, 2).view(torch.float8_e8m0fnu), quant_mode=-1, **_routing(d)), NEW, "aclnnMoeInitRoutingV3"),
        VendorCall("sort-int8", "npu::npu_moe_init_routing_v2", (x, ids), dict(quant_mode=1, **_routing(d)), aclnn="aclnnMoeInitRoutingV3"),
        VendorCall("sum", sum_up, (rows, None, None, None, weights, order, None), {"drop_pad_mode": 2}, aclnn="aclnnMoeFinalizeRoutingV4"),
        VendorCall("sum-all", sum_up, (rows, d.normal(T, H), d.normal(T, H), d.normal(E, H), weights, order, ids), {"drop_pad_mode": 0, "k": K},
                   aclnn="aclnnMoeFinalizeRoutingV4"),
        VendorCall("sum-fp32-weights", sum_up, (rows, d.normal(T, H), None, None, d.normal(T, K, dtype=F32), order, None), {"drop_pad_mode": 2, "k": K},
                   aclnn="aclnnMoeFinalizeRoutingV4"),
        VendorCall("write", "npu::npu_scatter_nd_update_", (d.normal(32, N), torch.tensor([[3], [30], [7]]), d.normal(3, N)),
                   aclnn="aclnnScatterNdUpdate"),
    ]  # fmt: skip


def indexing(d: _Draw) -> list[VendorCall]:
    pages = {"block_table": torch.tensor([[1, 2], [4, 3]], dtype=I32), "layout_query": "TND", "layout_key": "PA_BSND"}
    lengths = {"actual_seq_lengths_query": torch.tensor([1, 3], dtype=I32), "actual_seq_lengths_key": torch.tensor([20, 31], dtype=I32)}
    scored = (d.normal(3, 64, 128), d.normal(5, 16, 1, 128), d.normal(3, 64))
    return [
        VendorCall("scores", "npu::npu_lightning_indexer", scored, {"sparse_count": 8, "sparse_mode": 0, **pages, **lengths},
                   aclnn="aclnnLightningIndexer"),
        VendorCall("by-rank", "npu::npu_moe_re_routing", (d.normal(8, H), torch.tensor([[1, 0, 2], [3, 1, 1]])),
                   {"per_token_scales": d.normal(8, dtype=F32), "expert_token_num_type": 1, "idx_type": 0}, aclnn="aclnnMoeReRouting"),
    ]  # fmt: skip


def activations(d: _Draw) -> list[VendorCall]:
    x, op = d.normal(T, 2 * H, scale=3.0), "npu::npu_dequant_swiglu_quant"
    sums = d.ints(T, 2 * H, low=-9999, high=9999, dtype=I32)
    scales = {"weight_scale": d.normal(E, 2 * H, dtype=F32, scale=1e-3), "activation_scale": d.normal(T, 1, dtype=F32).abs(), "group_index": COUNTS}
    clipped = {"dim": -1, "alpha": 1.0, "limit": 2.0, "bias": 0.0, "interleaved": False}
    return [
        VendorCall("swiglu", "npu::npu_swiglu", (x,), {"dim": -1}, aclnn="aclnnSwiGlu"),
        VendorCall("clipped", "npu::npu_clipped_swiglu", (x,), clipped, OLDER, "aclnnClippedSwiglu"),
        VendorCall("swiglu-int8", op, (x,), dict(quant_mode=1, activate_dim=-1, **ACT), aclnn="aclnnDequantSwigluQuantV2"),
        VendorCall("swiglu-int8-old", op, (x,), dict(quant_mode=1, **ACT), OLDER, "aclnnDequantSwigluQuantV2"),
        VendorCall("swiglu-int8-lost-clamp", op, (x,), dict(quant_mode=1, **ACT), NEW, "aclnnDequantSwigluQuant"),
        VendorCall("swiglu-int32", op, (sums,), dict(quant_mode=1, activate_dim=-1, **scales, **ACT), aclnn="aclnnDequantSwigluQuantV2"),
        VendorCall("swiglu-mxfp8", "npu::npu_swiglu_mx_quant", (x,), dict(dst_type=ACL_E4M3, scale_alg=1, **ACT), NEW, "aclnnSwigluMxQuant"),
        VendorCall("swiglu-mxfp4", "npu::npu_swiglu_mx_quant", (x,), dict(dst_type=ACL_FP4, group_index=COUNTS, **ACT), NEW, "aclnnSwigluMxQuant"),
    ]  # fmt: skip


FAMILIES: tuple[Callable[[_Draw], list[VendorCall]], ...] = (norms, quants, products, grouped, routing, indexing, activations)


def all_calls(seed: int = 0) -> list[VendorCall]:
    """Every call, with operands drawn from `seed`."""
    return [c for family in FAMILIES for c in family(_Draw(seed))]
