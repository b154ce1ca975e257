"""`v4 plan`: what a configuration costs in memory, arithmetic and communication, beside DeepSeek-V3.2, without any weights.

Every figure comes from the configuration, the checkpoint's tensor table, the cache's row sizes and the contracts' cost functions.
"""

from __future__ import annotations

from typing import Any

import torch

from ops.experts_quant import grouped_experts_fp4
from tools import costing, v32
from tools.runconfig import CONFIGS, named_config
from v4.config import Config
from v4.tensors import plan as tensor_plan

GIB = 2**30


def communication(config: Config) -> dict[str, float]:
    """Arithmetic and traffic of one (token, expert) pair under expert parallelism: FP8 rows out, BF16 rows back.

    Communication hides behind computation while FLOP/s divided by the interconnect's bytes/s stays below `flop_per_byte`.
    """
    d, i = config.hidden_size, config.moe_intermediate_size

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row = empty(1, d, dtype=torch.bfloat16)
    s13, s2 = empty(1, 2 * i, d // 32, dtype=torch.float8_e8m0fnu), empty(1, d, i // 32, dtype=torch.float8_e8m0fnu)
    weight, counts = empty(1, dtype=torch.float32), torch.ones(1, dtype=torch.int64)
    w13, w2 = empty(1, 2 * i, d // 2), empty(1, d, i // 2)
    cost = grouped_experts_fp4.cost(row, weight, counts, w13, s13, w2, s2, limit=config.swiglu_limit)
    moved = d * torch.float8_e4m3fn.itemsize + d * torch.bfloat16.itemsize
    return {"flop_per_pair": cost.matmul_flops, "bytes_per_pair": moved, "flop_per_byte": cost.matmul_flops / moved}


def _flops(ledger: costing.Ledger, weighting: str) -> dict[str, float]:
    groups = {group: ledger.flops(weighting, group) for group in ("linear", "head", "core", "index")}
    return {**groups, "total": ledger.flops(weighting)}


def report(name: str, context: int, ranks: int = 1) -> dict[str, Any]:
    """Everything `v4 plan --json` prints (keys: docs and tests/test_plan.py). Ratios are fractions, sizes bytes.

    ValueError for an unknown configuration, a context beyond the model's positions, or ranks that do not divide it.
    """
    config = named_config(name)
    ledger = costing.decode_ledger(config, context)
    weights = tensor_plan(config, ranks)
    other = v32.V32.from_file(CONFIGS / "v32.json")
    other_ledger, other_bytes = v32.decode_ledger(other, context), v32.bytes_per_token(other)
    per_token, sequence = costing.bytes_per_token(config), costing.sequence_bytes(config, context)
    largest = max(rank["bytes"] for rank in weights["per_rank"])
    return {
        "config": name,
        "context": context,
        "ranks": ranks,
        "parameters": weights["parameters"],
        "weight_bytes": weights["bytes"],
        "weight_bytes_per_rank": [rank["bytes"] for rank in weights["per_rank"]],
        "cache_bytes_per_token": per_token,
        "cache_bytes": sequence,
        "memory_bytes_per_rank": largest + sequence,
        "flops_per_token": {w: _flops(ledger, w) for w in ("raw", "equivalent_fp8")},
        "ops": ledger.by_op(),
        "communication": communication(config),
        "v32": {
            "cache_bytes_per_token": other_bytes,
            "flops_per_token": {w: _flops(other_ledger, w) for w in ("raw", "equivalent_fp8")},
        },
        "cache_vs_v32": per_token / other_bytes,
        "flops_vs_v32": {w: ledger.flops(w) / other_ledger.flops(w) for w in costing.WEIGHTINGS},
    }


_MEANING = {
    "raw": "2 FLOP per multiply-add",
    "equivalent_fp8": "BF16 and FP32 x2, FP8 x1, FP4 index x0.5",
    "core_x2_index_half": "core attention x2, FP4 index x0.5, rest x1",
    "core_x2": "core attention x2, rest x1",
    "index_half": "FP4 index x0.5, rest x1",
}


def text(r: dict[str, Any]) -> str:
    """The report for people."""
    raw, other = r["flops_per_token"]["raw"], r["v32"]["flops_per_token"]["raw"]
    pair, largest = r["communication"], max(r["weight_bytes_per_rank"])
    others = f"V3.2 {r['v32']['cache_bytes_per_token']:,.0f} B: {r['cache_vs_v32']:.1%}"
    lines = [
        f"{r['config']} at {r['context']:,} tokens of context, {r['ranks']} rank(s)",
        "",
        f"parameters            {r['parameters'] / 1e9:12,.2f} B",
        f"weights               {r['weight_bytes'] / 1e9:12,.2f} GB   largest rank {largest / 1e9:,.2f} GB",
        f"cache per token       {r['cache_bytes_per_token']:12,.0f} B    {others}",
        f"cache of one sequence {r['cache_bytes'] / 1e9:12,.2f} GB   with window rows and compressor state, whole on every rank",
        f"memory of a rank      {r['memory_bytes_per_rank'] / GIB:12,.1f} GiB  weights and one sequence",
        "",
        "GFLOP per decoded token      linear      head      core     index     total",
        *(
            f"{label:<24s}" + "".join(f"{row[g] / 1e9:10,.2f}" for g in ("linear", "head", "core", "index", "total"))
            for label, row in ((r["config"], raw), ("V3.2", other))
        ),
        "",
        "share of V3.2's FLOPs",
        *(f"  {w:<20s}{share:8.2%}   {_MEANING[w]}" for w, share in r["flops_vs_v32"].items()),
        "",
        f"expert parallelism: {pair['flop_per_pair'] / 1e6:,.1f} MFLOP and {pair['bytes_per_pair']:,} B per token and expert: "
        f"{pair['flop_per_byte']:,.0f} FLOP/B; each GB/s of interconnect feeds {pair['flop_per_byte'] / 1e3:.1f} TFLOP/s",
        "",
        f"{'op':<22s}{'calls':>7s}{'GFLOP':>10s}{'vector MFLOP':>14s}{'MB':>11s}",
        *(_op_line(op, row) for op, row in r["ops"].items()),
    ]
    return "\n".join(lines)


def _op_line(op: str, row: dict[str, float]) -> str:
    flops, vector, moved = row["matmul_flops"] / 1e9, row["vector_flops"] / 1e6, row["bytes"] / 1e6
    return f"{op:<22s}{row['calls']:>7d}{flops:>10.3f}{vector:>14.2f}{moved:>11.1f}"


def shortage(r: dict[str, Any], memory_gib: float) -> str | None:
    """Why a rank with this much memory can not hold its weights and one sequence, or None when it can."""
    needed = r["memory_bytes_per_rank"] / GIB
    if needed <= memory_gib:
        return None
    return (
        f"{r['config']} at {r['context']:,} tokens on {r['ranks']} rank(s) needs {needed:,.1f} GiB per rank, "
        f"{memory_gib:,.1f} GiB are given; use more ranks or a shorter context"
    )
