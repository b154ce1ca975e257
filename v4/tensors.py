"""Every tensor of a checkpoint by configuration: names, stored types and shapes, their sizes, and how they split over ranks.

Source: specification sections 10.1 (names, types, shapes), 10.2 (order and files) and 10.6 (split). D hidden, V vocabulary,
E experts, I expert width, H heads, C head width, G output groups, n streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from v4.config import Config

ITEM_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "BOOL": 1,
}  # fmt: skip
"""Bytes per element by safetensors type name."""

STORAGES = ("hub", "f32", "bf16")
BLOCK = 128
GROUP = 32


class TensorSpec(NamedTuple):
    """One stored tensor: hub name, safetensors type name, shape as stored (packed FP4: half the columns), weights per I8 element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codes: int = 2

    @property
    def numel(self) -> int:
        """Stored elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def weights(self) -> int:
        """Values it stands for: two per packed FP4 byte; scales and token-to-expert tables stand for none."""
        if self.dtype in ("F8_E8M0", "I64") or (self.codes == 1 and self.name.endswith(".scale")):
            return 0
        return self.numel * (self.codes if self.dtype == "I8" else 1)

    @property
    def parameters(self) -> int:
        """Its share of the published parameter counts, which are those of the main model's matrices.

        Not in them: MTP blocks, vectors (norms, sinks, biases, hyper-connection offsets and factors), additive tables (`ape`).
        """
        return 0 if len(self.shape) < 2 or self.name.startswith("mtp.") or self.name.endswith(".ape") else self.weights


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


class _Table:
    """Writes the specs of one configuration and storage."""

    def __init__(self, config: Config, storage: str) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r}: expected one of {', '.join(STORAGES)}")
        self.c = config
        self.plain = {"hub": "BF16", "f32": "F32", "bf16": "BF16"}[storage]
        hub = storage == "hub"
        self.linear = "fp8" if hub and config.weight_block_size else "plain"
        self.experts = config.expert_dtype if hub else "plain"
        if self.experts == "int8":
            self.linear, self.experts = "int8", "int8-bf16"
        # the grouped product has no INT8 form
        self.grouped = "plain" if self.linear == "int8" else self.linear

    def weight(self, name: str, rows: int, columns: int, kind: str) -> Iterator[TensorSpec]:
        """A matrix [rows, columns] as `kind` ("fp8", "fp4", "bf16", "fp32", "plain"), with its scale when it has one."""
        if kind == "fp8":
            yield TensorSpec(f"{name}.weight", "F8_E4M3", (rows, columns))
            yield TensorSpec(f"{name}.scale", "F8_E8M0", (_blocks(rows, BLOCK), _blocks(columns, BLOCK)))
        elif kind == "fp4":
            if columns % GROUP:
                raise ValueError(
                    f"{name}: {columns} input channels do not divide into FP4 groups of {GROUP}; use expert_dtype 'fp8' or 'bf16'"
                )
            yield TensorSpec(f"{name}.weight", "I8", (rows, columns // 2))
            yield TensorSpec(f"{name}.scale", "F8_E8M0", (rows, columns // GROUP))
        elif kind.startswith("int8"):
            yield TensorSpec(f"{name}.weight", "I8", (rows, columns), 1)
            yield TensorSpec(f"{name}.scale", "BF16" if kind == "int8-bf16" else "F32", (rows,), 1)
        else:
            yield TensorSpec(f"{name}.weight", {"bf16": "BF16", "fp32": "F32"}.get(kind, self.plain), (rows, columns))

    def vector(self, name: str, size: int) -> TensorSpec:
        return TensorSpec(f"{name}.weight", self.plain, (size,))

    def hyper(self, name: str, *, head: bool = False) -> Iterator[TensorSpec]:
        n = self.c.hc_mult
        rows = n if head else (2 + n) * n
        yield TensorSpec(f"{name}_fn", "F32", (rows, n * self.c.hidden_size))
        yield TensorSpec(f"{name}_base", "F32", (rows,))
        yield TensorSpec(f"{name}_scale", "F32", (1 if head else 3,))

    def compressor(self, p: str, ratio: int, width: int) -> Iterator[TensorSpec]:
        w = width * (2 if ratio == 4 else 1)
        yield TensorSpec(f"{p}.ape", "F32", (ratio, w))
        for part in ("wkv", "wgate"):
            yield from self.weight(f"{p}.{part}", w, self.c.hidden_size, "plain")
        yield self.vector(f"{p}.norm", width)

    def attention(self, p: str, ratio: int) -> Iterator[TensorSpec]:
        c, kind = self.c, self.linear
        width = c.num_attention_heads * c.head_dim
        yield TensorSpec(f"{p}.attn_sink", "F32", (c.num_attention_heads,))
        yield from self.weight(f"{p}.wq_a", c.q_lora_rank, c.hidden_size, kind)
        yield self.vector(f"{p}.q_norm", c.q_lora_rank)
        yield from self.weight(f"{p}.wq_b", width, c.q_lora_rank, kind)
        yield from self.weight(f"{p}.wkv", c.head_dim, c.hidden_size, kind)
        yield self.vector(f"{p}.kv_norm", c.head_dim)
        yield from self.weight(f"{p}.wo_a", c.o_groups * c.o_lora_rank, width // c.o_groups, self.grouped)
        yield from self.weight(f"{p}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank, kind)
        if ratio:
            yield from self.compressor(f"{p}.compressor", ratio, c.head_dim)
        if ratio == 4:
            yield from self.weight(f"{p}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank, kind)
            yield from self.weight(f"{p}.indexer.weights_proj", c.index_n_heads, c.hidden_size, "plain")
            yield from self.compressor(f"{p}.indexer.compressor", 4, c.index_head_dim)

    def experts_of(self, p: str) -> Iterator[TensorSpec]:
        d, i = self.c.hidden_size, self.c.moe_intermediate_size
        for e in range(self.c.n_routed_experts):
            for part, rows, columns in (("w1", i, d), ("w2", d, i), ("w3", i, d)):
                yield from self.weight(f"{p}.experts.{e}.{part}", rows, columns, self.experts)
        i *= self.c.n_shared_experts
        for part, rows, columns in (("w1", i, d), ("w2", d, i), ("w3", i, d)):
            yield from self.weight(f"{p}.shared_experts.{part}", rows, columns, self.linear)

    def block(self, p: str, ratio: int, hashed: bool) -> Iterator[TensorSpec]:
        c = self.c
        yield self.vector(f"{p}.attn_norm", c.hidden_size)
        yield self.vector(f"{p}.ffn_norm", c.hidden_size)
        for part in ("attn", "ffn"):
            yield from self.hyper(f"{p}.hc_{part}")
        yield from self.attention(f"{p}.attn", ratio)
        yield from self.weight(f"{p}.ffn.gate", c.n_routed_experts, c.hidden_size, "plain")
        if hashed:
            yield TensorSpec(f"{p}.ffn.gate.tid2eid", "I64", (c.vocab_size, c.num_experts_per_tok))
        else:
            yield TensorSpec(f"{p}.ffn.gate.bias", "F32", (c.n_routed_experts,))
        yield from self.experts_of(f"{p}.ffn")

    def mtp(self, p: str, ratio: int) -> Iterator[TensorSpec]:
        d = self.c.hidden_size
        for part in ("e_proj", "h_proj"):
            yield from self.weight(f"{p}.{part}", d, d, self.linear)
        for part in ("enorm", "hnorm", "norm"):
            yield self.vector(f"{p}.{part}", d)
        yield from self.hyper(f"{p}.hc_head", head=True)
        yield from self.block(p, ratio, hashed=False)

    def all(self) -> Iterator[TensorSpec]:
        c = self.c
        yield from self.weight("embed", c.vocab_size, c.hidden_size, "plain")
        for i in range(c.num_hidden_layers):
            yield from self.block(f"layers.{i}", c.ratio(i), c.is_hash(i))
        yield self.vector("norm", c.hidden_size)
        yield from self.weight("head", c.vocab_size, c.hidden_size, "plain")
        yield from self.hyper("hc_head", head=True)
        for i in range(c.num_nextn_predict_layers):
            yield from self.mtp(f"mtp.{i}", c.ratio(c.num_hidden_layers + i))


def checkpoint_tensors(config: Config, storage: str = "hub") -> list[TensorSpec]:
    """Every tensor of a checkpoint, in file order: embedding, layers, final norm and head, MTP blocks.

    storage: "hub" (FP8 with 128x128 E8M0 scales, experts as `config.expert_dtype`; with expert_dtype "int8" every linear layer but wo_a in
    INT8 channels, scales F32, those of experts BF16), "f32" or "bf16" (same names without scales,
    everything plain; tables stay I64 and the tensors that are always fp32 stay F32). ValueError for another storage, or for
    FP4 experts whose width is no multiple of 32.
    """
    return list(_Table(config, storage).all())


def section(name: str) -> str:
    """The shard a tensor belongs to in the hub's layout: "embed", "layers.N", "head" (norm, head, hc_head) or "mtp.N"."""
    parts = name.split(".")
    if parts[0] in ("layers", "mtp"):
        return ".".join(parts[:2])
    return "embed" if parts[0] == "embed" else "head"


_ROWS = ("attn.wq_b", "attn.indexer.wq_b", "attn.indexer.weights_proj", "attn.wo_a")


def split(spec: TensorSpec, config: Config, rank: int, ranks: int) -> tuple[slice, ...] | None:
    """The part of a tensor that one of `ranks` holds, as one slice per dimension; None when it holds nothing of it.

    Routed experts: contiguous ranges. Rows: wq_b, indexer wq_b and weights_proj, attn_sink, embed, head, wo_a (whole groups).
    Columns: wo_b. Everything else whole on every rank. ValueError when a dimension does not divide.
    """
    whole = tuple(slice(0, n) for n in spec.shape)
    parts = spec.name.split(".")
    if "experts" in parts:
        expert = int(parts[parts.index("experts") + 1])
        return whole if expert // _share("n_routed_experts", config.n_routed_experts, ranks) == rank else None
    stem = ".".join(p for p in parts if p not in ("weight", "scale")).split(".", 2)
    inner = stem[2] if stem[0] in ("layers", "mtp") and len(stem) == 3 else ".".join(stem)
    if inner == "attn.wo_b":
        n = _share(f"columns of {spec.name}", spec.shape[1], ranks)
        return (whole[0], slice(rank * n, (rank + 1) * n))
    if inner in (*_ROWS, "attn.attn_sink", "embed", "head"):
        if inner == "attn.wo_a":
            _share("o_groups", config.o_groups, ranks)
        n = _share(f"rows of {spec.name}", spec.shape[0], ranks)
        return (slice(rank * n, (rank + 1) * n), *whole[1:])
    return whole


def _share(what: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise ValueError(f"{what}: {size} do not divide over {ranks} ranks; choose a number of ranks that divides {size}")
    return size // ranks


def plan(config: Config, ranks: int = 1, storage: str = "hub") -> dict[str, Any]:
    """Sizes of a checkpoint without its weights: {tensors, parameters, weights, bytes, by_dtype, per_rank}.

    parameters: the published count (TensorSpec.parameters); weights: every stored value, MTP blocks and vectors included.
    bytes: tensor data, the index file's total_size. by_dtype: type -> {tensors, bytes}. per_rank: one {rank, tensors, parameters,
    weights, bytes} per rank under `split`; all ranks hold equal amounts. ValueError for ranks that do not divide the model.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: expected at least 1")
    specs = checkpoint_tensors(config, storage)
    by_dtype: dict[str, dict[str, int]] = {}
    for s in specs:
        entry = by_dtype.setdefault(s.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += s.bytes
    # every split dimension divides evenly, or split raises: rank 0 stands for all
    mine = [s for s in (_part(s, config, 0, ranks) for s in specs) if s is not None]
    return {
        **_totals(specs),
        "by_dtype": by_dtype,
        "per_rank": [{"rank": rank, **_totals(mine)} for rank in range(ranks)],
    }


def _part(spec: TensorSpec, config: Config, rank: int, ranks: int) -> TensorSpec | None:
    where = split(spec, config, rank, ranks)
    return None if where is None else TensorSpec(spec.name, spec.dtype, tuple(s.stop - s.start for s in where))


def _totals(specs: list[TensorSpec]) -> dict[str, int]:
    return {
        "tensors": len(specs),
        "parameters": sum(s.parameters for s in specs),
        "weights": sum(s.weights for s in specs),
        "bytes": sum(s.bytes for s in specs),
    }
