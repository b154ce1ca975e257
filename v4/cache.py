"""Paged caches of one model: pools of blocks, one block table per group and sequence.

Every row is addressed by its absolute number (token position, or entry index), never by a ring slot. Blocks behind the
live range are recycled, so a chunk of any length is written before it is read and rejected draft tokens need no repair:
truncating a sequence is enough.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ops.cache import fp8_row_parts
from v4.config import Config

HOST = torch.device("cpu")
"""Where tables, lengths and positions are made: their sizes decide the shapes of a call."""

SLACK = 64
"""Tokens a sequence may be rolled back by: the longest draft that can be rejected."""


@dataclass(frozen=True)
class Format:
    """Storage of cache rows. `kv`: "plain" (activation type) or "fp8" (584-byte packed entries); `index`: "plain", "fp8", "fp4"."""

    kv: str = "plain"
    index: str = "plain"

    def __post_init__(self) -> None:
        if self.kv not in ("plain", "fp8"):
            raise ValueError(f"cache format kv={self.kv!r}: expected 'plain' or 'fp8'")
        if self.index not in ("plain", "fp8", "fp4"):
            raise ValueError(f"cache format index={self.index!r}: expected 'plain', 'fp8' or 'fp4'")


@dataclass(frozen=True)
class GroupSpec:
    """One kind of rows.

    `keep`: rows behind the end that stay live (None: all). `whole_chunk`: every row of a call is stored, not only those
    that stay live after it.
    """

    name: str
    tokens_per_row: int
    block_rows: int
    keep: int | None
    whole_chunk: bool = True

    def live_blocks(self, width: int, max_chunk: int) -> int:
        """Most blocks that one sequence can hold at a time."""
        if self.keep is None:
            return width
        new = max_chunk if self.whole_chunk else min(max_chunk, self.keep)
        # blocks of tokens that were rolled back stay until the sequence passes them again
        return min(width, -(-(self.keep + SLACK + new) // self.block_rows) + 4)


def group_specs(config: Config, ratios: Seq[int]) -> dict[str, GroupSpec]:
    """The groups that layers of these compression ratios need."""
    specs = {"window": GroupSpec("window", 1, 128, config.sliding_window + SLACK)}
    for m in sorted(set(ratios) - {0}):
        overlap = 2 if m == 4 else 1
        specs[f"entries{m}"] = GroupSpec(f"entries{m}", m, 128 if m == 4 else 16, None)
        specs[f"state{m}"] = GroupSpec(f"state{m}", 1, 16 if m <= 16 else 128, overlap * m + SLACK, False)
    return specs


class CacheFull(ValueError):
    """A sequence asks for more rows than the cache was built for."""


class Group:
    """Block tables and the free list of one group; block 0 is the null block and never given out."""

    def __init__(self, spec: GroupSpec, max_tokens: int, max_sequences: int, max_chunk: int) -> None:
        self.spec = spec
        rows = -(-max_tokens // spec.tokens_per_row)
        self.width = max(-(-rows // spec.block_rows), 1)
        self.blocks = 1 + spec.live_blocks(self.width, min(max_chunk, max_tokens)) * max_sequences
        self.table = torch.zeros(max_sequences, self.width, dtype=torch.int32, device=HOST)
        self._rows = self.table.numpy()
        self._free = list(range(1, self.blocks))
        self._low = [0] * max_sequences

    def reserve(self, slot: int, start: int, end: int) -> None:
        """Give blocks to the rows of tokens [start, end) of the sequence in `slot`; recycles what is behind the live range."""
        spec = self.spec
        first, last = start // spec.tokens_per_row, -(-end // spec.tokens_per_row)
        if spec.keep is not None:
            keep_from = max(start - spec.keep, 0) // spec.block_rows
            self._release(slot, self._low[slot], keep_from)
            self._low[slot] = max(self._low[slot], keep_from)
            if not spec.whole_chunk:
                first = max(first, end - spec.keep)
        b0, b1 = first // spec.block_rows, -(-last // spec.block_rows)
        if b1 > self.width:
            raise CacheFull(
                f"cache group {spec.name}: token {end} needs {b1} blocks, the cache was built for {self.width}; raise max_context"
            )
        row = self._rows[slot]
        for block in range(b0, b1):
            if row[block] == 0:
                if not self._free:
                    raise CacheFull(
                        f"cache group {spec.name}: all {self.blocks - 1} blocks are in use; build it for more sequences or chunks"
                    )
                row[block] = heapq.heappop(self._free)

    def _release(self, slot: int, first: int, end: int) -> None:
        row = self._rows[slot]
        for block in range(first, end):
            if used := int(row[block]):
                heapq.heappush(self._free, used)
                row[block] = 0

    def clear(self, slot: int) -> None:
        """Return every block of the sequence in `slot`."""
        self._release(slot, 0, self.width)
        self._low[slot] = 0

    @property
    def free_blocks(self) -> int:
        """Blocks not in use."""
        return len(self._free)


@dataclass
class Sequence:
    """One sequence's place in the cache: its table row and the number of tokens stored."""

    slot: int
    length: int = 0
    _furthest: int = field(default=0, repr=False)

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens (rejected drafts). ValueError beyond SLACK tokens behind the furthest one stored."""
        if not 0 <= tokens <= self.length:
            raise ValueError(f"rollback of {tokens} tokens: the sequence holds {self.length}")
        if self._furthest - (self.length - tokens) > SLACK:
            raise ValueError(f"rollback of {tokens} tokens: at most {SLACK} behind the furthest stored token can be undone")
        self.length -= tokens

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored."""
        self.length += tokens
        self._furthest = max(self._furthest, self.length)


@dataclass
class LayerCache:
    """Tensors of one layer; absent kinds are None. Shapes [blocks, rows, width]; states hold k and score side by side, fp32."""

    window: Tensor
    entries: Tensor | None = None
    state: Tensor | None = None
    index_keys: Tensor | None = None
    index_state: Tensor | None = None


def row_bytes(config: Config, fmt: Format, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one attention row and of one index key under a format."""
    item = dtype.itemsize
    kv = config.head_dim * item if fmt.kv == "plain" else sum(fp8_row_parts(config.head_dim, config.qk_rope_head_dim))
    d = config.index_head_dim
    index = {"plain": d * item, "fp8": d + 4, "fp4": d // 2 + d // 32}[fmt.index]
    return kv, index


class Cache:
    """All caches of a stack of layers for up to `max_sequences` sequences of up to `max_tokens` tokens.

    `max_chunk` is the longest stretch of new tokens per call. Raises ValueError for non-positive sizes.
    """

    def __init__(
        self,
        config: Config,
        ratios: Seq[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        max_sequences: int = 1,
        max_chunk: int = 4096,
        fmt: Format = Format(),
    ) -> None:
        if min(max_tokens, max_sequences, max_chunk) < 1:
            raise ValueError(
                f"cache sizes must be positive; found tokens {max_tokens}, sequences {max_sequences}, chunk {max_chunk}"
            )
        self.config, self.ratios, self.format = config, tuple(ratios), fmt
        self.max_tokens, self.max_chunk = max_tokens, max_chunk
        self.groups = {
            name: Group(spec, max_tokens, max_sequences, max_chunk) for name, spec in group_specs(config, ratios).items()
        }
        self._free_slots = list(range(max_sequences))
        kv_bytes, index_bytes = row_bytes(config, fmt, dtype)
        kv_width, kv_type = (config.head_dim, dtype) if fmt.kv == "plain" else (kv_bytes, torch.uint8)
        index_width, index_type = (config.index_head_dim, dtype) if fmt.index == "plain" else (index_bytes, torch.uint8)

        def pool(group: str, width: int, kind: torch.dtype) -> Tensor:
            g = self.groups[group]
            return torch.zeros(g.blocks, g.spec.block_rows, width, dtype=kind, device=device)

        self.layers: list[LayerCache] = []
        for m in ratios:
            layer = LayerCache(pool("window", kv_width, kv_type))
            if m:
                overlap = 2 if m == 4 else 1
                layer.entries = pool(f"entries{m}", kv_width, kv_type)
                layer.state = pool(f"state{m}", 2 * overlap * config.head_dim, torch.float32)
                if m == 4:
                    layer.index_keys = pool("entries4", index_width, index_type)
                    layer.index_state = pool("state4", 4 * config.index_head_dim, torch.float32)
            self.layers.append(layer)

    def new_sequence(self) -> Sequence:
        """Claim a table row. CacheFull when every one is taken."""
        if not self._free_slots:
            raise CacheFull("every sequence slot of the cache is taken; free one or build the cache for more sequences")
        return Sequence(heapq.heappop(self._free_slots))

    def free(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks and its table row."""
        for group in self.groups.values():
            group.clear(sequence.slot)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.length = 0

    def reserve(self, sequence: Sequence, tokens: int) -> None:
        """Blocks for the next `tokens` tokens in every group. CacheFull past max_tokens, ValueError past max_chunk."""
        end = sequence.length + tokens
        if end > self.max_tokens:
            raise CacheFull(
                f"sequence of {end} tokens: the cache was built for {self.max_tokens}; raise max_context or shorten the prompt"
            )
        if tokens > self.max_chunk:
            raise ValueError(f"chunk of {tokens} tokens: the cache was built for chunks of at most {self.max_chunk}")
        for group in self.groups.values():
            group.reserve(sequence.slot, sequence.length, end)

    def assume(self, sequence: Sequence, tokens: int) -> None:
        """Blocks and length of a new sequence as if `tokens` tokens were stored; the rows keep what they hold."""
        if tokens > self.max_tokens:
            raise CacheFull(f"synthetic context of {tokens} tokens: the cache was built for {self.max_tokens}")
        for group in self.groups.values():
            keep = group.spec.keep
            group.reserve(sequence.slot, 0 if keep is None else max(tokens - keep, 0), tokens)
        sequence.advance(tokens)

    def fill_synthetic(self, sequence: Sequence, tokens: int, seed: int = 0) -> None:
        """Make `sequence` look as if `tokens` tokens were stored, with random rows (for measurements at long context)."""
        self.assume(sequence, tokens)
        generator = torch.Generator(HOST).manual_seed(seed)
        for pool in self.pools():
            if pool.is_floating_point():
                pool.copy_(torch.randn(pool.shape, generator=generator, device=HOST))
            else:
                pool.copy_(torch.randint(0, 96, pool.shape, generator=generator, dtype=pool.dtype, device=HOST))

    def pools(self) -> list[Tensor]:
        """Every pool tensor."""
        return [
            t
            for layer in self.layers
            for t in (layer.window, layer.entries, layer.state, layer.index_keys, layer.index_state)
            if t is not None
        ]

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        return sum(t.numel() * t.element_size() for t in self.pools())
