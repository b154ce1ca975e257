"""What a decode step costs: the real graph runs on the meta device over ops that only record their contracts' cost.

Nothing is computed and no weight exists, so a 1.6T model at a million tokens takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ops.contract import CONTRACTS, Cost
from v4 import batch as batches
from v4 import rope
from v4.cache import Cache, Format
from v4.config import Config
from v4.model import Model
from v4.settings import Settings
from v4.tensors import checkpoint_tensors

DEPLOYED = Format(kv="fp8", index="fp4")
"""Cache rows as DeepSeek deploys them: 584-byte packed entries and 68-byte index keys."""

GROUPS = {"sparse_attention": "core", "index_topk": "index"}
"""Ops that specification section 12 counts apart; the LM head is the third, every other product is "linear"."""

Weighting = Callable[[str, str], float]

# Factor of a product's FLOPs by (group, arithmetic). BF16 and FP32 run at half the FP8 rate, FP4 x FP4 at twice.
WEIGHTINGS: dict[str, Weighting] = {
    "raw": lambda group, rate: 1.0,
    "equivalent_fp8": lambda group, rate: {"fp32": 2.0, "bf16": 2.0, "fp4": 0.5}.get(rate, 1.0),
    "core_x2_index_half": lambda group, rate: 2.0 if group == "core" else 0.5 if rate == "fp4" else 1.0,
    "core_x2": lambda group, rate: 2.0 if group == "core" else 1.0,
    "index_half": lambda group, rate: 0.5 if rate == "fp4" else 1.0,
}


@dataclass(frozen=True)
class Call:
    """One op call: its group ("linear", "head", "core", "index"), the arithmetic of its products and its cost."""

    op: str
    group: str
    rate: str
    cost: Cost


@dataclass
class Ledger:
    """Every op call of one decode step."""

    calls: list[Call] = field(default_factory=list)

    def flops(self, weighting: str = "raw", group: str | None = None) -> float:
        """FLOPs of matrix products (2 per multiply-add) under a weighting, of one group or of all."""
        factor = WEIGHTINGS[weighting]
        return sum(c.cost.matmul_flops * factor(c.group, c.rate) for c in self.calls if group in (None, c.group))

    def by_op(self) -> dict[str, dict[str, float]]:
        """op -> {calls, matmul_flops, vector_flops, bytes}, largest products first."""
        rows: dict[str, dict[str, float]] = {}
        for c in self.calls:
            row = rows.setdefault(c.op, {"calls": 0, "matmul_flops": 0, "vector_flops": 0, "bytes": 0})
            row["calls"] += 1
            row["matmul_flops"] += c.cost.matmul_flops
            row["vector_flops"] += c.cost.vector_flops
            row["bytes"] += c.cost.bytes
        return dict(sorted(rows.items(), key=lambda item: (-item[1]["matmul_flops"], -item[1]["vector_flops"])))


def recorder(record: Callable[[str, tuple[Any, ...], Cost], None]) -> SimpleNamespace:
    """A namespace of every op: a call records (op, args, cost) and returns the contract's meta outputs."""

    def call(op: str, *args: Any, **kwargs: Any) -> Any:
        record(op, args, CONTRACTS[op].cost(*args, **kwargs))
        return CONTRACTS[op].meta(*args, **kwargs)

    return SimpleNamespace(**{op: partial(call, op) for op in CONTRACTS})


def stored_fp8(model: nn.Module, config: Config) -> set[int]:
    """Identities of the parameters that the checkpoint stores in FP8.

    A product counts by the type of its stored weight. This matters for wo_a only: the official converter widens it to BF16, but
    the section 12 figures come out when it counts as the FP8 weight that it is (10.1 % of V3.2; as BF16 it would be 10.3 %).
    """
    stored = {t.name for t in checkpoint_tensors(config) if t.dtype == "F8_E4M3"}
    return {id(p) for name, p in model.named_parameters() if name in stored or f"{name}.weight" in stored}


def _fill(cache: Cache, tokens: int) -> Any:
    sequence = cache.new_sequence()
    cache.assume(sequence, tokens)
    return sequence


def meta_cache(config: Config, tokens: int, fmt: Format = DEPLOYED, max_chunk: int = 1) -> Cache:
    """The main model's caches for one sequence of `tokens` tokens, without storage."""
    ratios = [config.ratio(i) for i in range(config.num_hidden_layers)]
    device = torch.device("meta")
    return Cache(config, ratios, dtype=torch.bfloat16, device=device, max_tokens=tokens, max_chunk=max_chunk, fmt=fmt)


def decode_ledger(config: Config, context: int) -> Ledger:
    """Costs of decoding the token that makes the context `context` tokens long, weights and caches in their deployed formats.

    ValueError for a context below 1 or beyond the model's positions.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise ValueError(f"context of {context} tokens: expected 1 to max_position_embeddings = {config.max_position_embeddings}")
    ledger = Ledger()
    fp8: set[int] = set()
    head: list[int] = []

    def record(op: str, args: tuple[Any, ...], cost: Cost) -> None:
        weights = [id(a) for a in args if isinstance(a, Tensor)]
        group = "head" if head and head[0] in weights else GROUPS.get(op, "linear")
        ledger.calls.append(Call(op, group, "fp8" if fp8.intersection(weights) else cost.rate, cost))

    packed = config.weight_block_size is not None
    experts = config.expert_dtype if config.expert_dtype in ("fp4", "fp8") else "dense"
    settings = Settings(config, recorder(record), torch.bfloat16, linears="fp8" if packed else "dense", experts=experts, format=DEPLOYED)
    model = Model(settings, mtp=False)
    fp8.update(stored_fp8(model, config))
    head.append(id(model.head.weight))
    cache = meta_cache(config, context)
    tables = batches.RopeTables(rope.frequencies(config, compressed=False), rope.frequencies(config, compressed=True))
    # metadata stays on the host, where contracts may read it; activations and weights are meta tensors
    layout = batches.build(cache, tables, [_fill(cache, context - 1)], [[0]], torch.device("cpu"))
    with torch.inference_mode():
        model.logits(model(layout, cache))
    return ledger


def bytes_per_token(config: Config, fmt: Format = DEPLOYED) -> float:
    """Cache bytes that every further token of context costs, from the row sizes of the pools that keep all rows."""
    cache = meta_cache(config, 1, fmt)
    total = 0.0
    for layer in range(config.num_hidden_layers):
        if ratio := config.ratio(layer):
            assert cache.groups[f"entries{ratio}"].spec.keep is None
            tensors: Iterable[Tensor | None] = (cache.layers[layer].entries, cache.layers[layer].index_keys)
            total += sum(t.shape[-1] * t.element_size() for t in tensors if t is not None) / ratio
    return total


def sequence_bytes(config: Config, context: int, fmt: Format = DEPLOYED) -> int:
    """Cache bytes of one sequence of `context` tokens: entries, index keys, live window rows and compressor state."""
    return meta_cache(config, context, fmt).bytes
