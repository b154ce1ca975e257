"""DeepSeek-V3.2 as a yardstick: cost of a decoded token and of a cached token, from configs/v32.json and the same contracts."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ops.contract import Cost
from ops.indexer import index_topk
from ops.linear import grouped_linear, linear, linear_fp8
from tools.costing import Call, Ledger

INDEX_SCALE_BYTES = 4
"""An FP8 index key carries one fp32 scale; the packed rows that index_topk accepts have the same width."""

_FP8, _BF16 = torch.float8_e4m3fn, torch.bfloat16


@dataclass(frozen=True)
class V32:
    """Shape of DeepSeek-V3.2: multi-head latent attention over the entries chosen by an indexer, mixture of experts."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    first_k_dense_replace: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int

    @classmethod
    def from_file(cls, path: Path) -> V32:
        """Read a hub config.json of DeepSeek-V3.2; KeyError for a missing field."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scales(rows: int, columns: int) -> Tensor:
    return _empty(-(-rows // 128), -(-columns // 128), dtype=torch.float8_e8m0fnu)


class _Step:
    """Records products of one token as calls of the linear contracts."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def fp8(self, rows: int, columns: int, times: int = 1) -> None:
        """FP8 weight [rows, columns], quantised activations."""
        x, weight = _empty(1, columns, dtype=_FP8), _empty(rows, columns, dtype=_FP8)
        x_scale = _empty(1, -(-columns // 128), dtype=torch.float8_e8m0fnu)
        self._add("linear_fp8", "linear", times, linear_fp8.cost(x, weight, _scales(rows, columns), x_scale=x_scale))

    def bf16(
        self, rows: int, columns: int, times: int = 1, *, group: str = "linear", tokens: int = 1, name: str = "linear"
    ) -> None:
        """BF16 product [tokens, columns] x [rows, columns]."""
        x, weight = _empty(tokens, columns, dtype=_BF16), _empty(rows, columns, dtype=_BF16)
        self._add(name, group, times, linear.cost(x, weight))

    def grouped(self, groups: int, rows: int, columns: int, times: int) -> None:
        """BF16 products of one token's heads, each with a weight [rows, columns] of its own."""
        x, weight = _empty(1, groups, columns, dtype=_BF16), _empty(groups, rows, columns, dtype=_BF16)
        self._add("grouped_linear", "linear", times, grouped_linear.cost(x, weight))

    def index(self, heads: int, width: int, context: int, topk: int, times: int) -> None:
        """FP8 index scores of one token over every token of the context."""
        args = (
            _empty(1, heads, width, dtype=_BF16),
            _empty(1, heads, dtype=torch.float32),
            _empty(1 + context, 1, width + INDEX_SCALE_BYTES, dtype=torch.uint8),
            torch.zeros(1, 1, dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([context - 1], dtype=torch.int32),
        )
        self._add("index_topk", "index", times, index_topk.cost(*args, ratio=1, topk=topk))

    def _add(self, op: str, group: str, times: int, cost: Cost) -> None:
        self.ledger.calls.extend([Call(op, group, cost.rate, cost)] * times)


def decode_ledger(c: V32, context: int) -> Ledger:
    """Costs of one decoded token at `context` tokens, attention in the absorbed form (specification section 12.2).

    The two per-head halves of kv_b, which the absorbed form multiplies with queries and outputs, run in BF16, as do gates,
    index head weights and the LM head; other weights are FP8. Core attention reads kv_lora_rank + qk_rope_head_dim channels of
    a row for its score and kv_lora_rank for its value.
    """
    step, layers, d, heads = _Step(), c.num_hidden_layers, c.hidden_size, c.num_attention_heads
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    step.fp8(c.q_lora_rank, d, layers)
    step.fp8(heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank, layers)
    step.fp8(latent, d, layers)
    step.grouped(heads, c.kv_lora_rank, c.qk_nope_head_dim, layers)
    step.grouped(heads, c.v_head_dim, c.kv_lora_rank, layers)
    step.fp8(d, heads * c.v_head_dim, layers)
    step.fp8(c.index_n_heads * c.index_head_dim, c.q_lora_rank, layers)
    step.fp8(c.index_head_dim, d, layers)
    step.bf16(c.index_n_heads, d, layers)
    dense = c.first_k_dense_replace
    for rows, columns in ((c.intermediate_size, d), (c.intermediate_size, d), (d, c.intermediate_size)):
        step.fp8(rows, columns, dense)
    active = (layers - dense) * (c.num_experts_per_tok + c.n_shared_experts)
    for rows, columns in ((c.moe_intermediate_size, d), (c.moe_intermediate_size, d), (d, c.moe_intermediate_size)):
        step.fp8(rows, columns, active)
    step.bf16(c.n_routed_experts, d, layers - dense)
    step.bf16(c.vocab_size, d, group="head")
    rows = min(c.index_topk, context)
    step.bf16(rows, latent, layers, group="core", tokens=heads, name="mla_scores")
    step.bf16(c.kv_lora_rank, rows, layers, group="core", tokens=heads, name="mla_values")
    step.index(c.index_n_heads, c.index_head_dim, context, c.index_topk, layers)
    return step.ledger


def bytes_per_token(c: V32) -> int:
    """Cache bytes of one token as deployed: FP8 latent with fp32 scales per 128 channels, BF16 rotary channels, FP8 index key."""
    entry = c.kv_lora_rank + 4 * (c.kv_lora_rank // 128) + 2 * c.qk_rope_head_dim
    return c.num_hidden_layers * (entry + c.index_head_dim + INDEX_SCALE_BYTES)
