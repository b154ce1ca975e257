"""Lightning indexer: which compressed entries each query of a CSA layer attends to.

Shapes: T tokens, Hi index heads, d index head width, E entries completed by the call, k choices per query.
"""

from __future__ import annotations

from torch import Tensor, nn

from v4.batch import Batch
from v4.cache import LayerCache
from v4.compressor import Compressor
from v4.linear import Linear, Quantised
from v4.settings import Settings


class Indexer(nn.Module):
    """Index queries, head weights and the index compressor (specification section 7)."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        c = s.config
        self.ops, self.simulate, self.format = s.ops, s.simulate, s.format.index
        self.heads, self.dim, self.topk = c.index_n_heads, c.index_head_dim, c.index_topk
        self.weight_scale = self.dim**-0.5 * self.heads**-0.5
        self.wq_b = Linear(s.ops, self.heads * self.dim, c.q_lora_rank, dtype=s.dtype, kind=s.linears)
        self.weights_proj = Linear(s.ops, self.heads, c.hidden_size, dtype=s.dtype)
        self.compressor = Compressor(s, 4, self.dim)

    def _rotate(self, x: Tensor) -> Tensor:
        # exact inner products do not change under the rotation: it only matters in front of a quantiser
        return self.ops.hadamard(x) if self.simulate or self.format != "plain" else x

    def _insert(self, keys_Ed: Tensor, cache: Tensor, slots_E: Tensor) -> None:
        keys_Ed = self._rotate(keys_Ed)
        if self.format == "fp4":
            self.ops.index_insert_fp4(cache, keys_Ed, slots_E)
        elif self.format == "fp8":
            self.ops.index_insert_fp8(cache, keys_Ed, slots_E)
        else:
            self.ops.cache_insert(cache, self.ops.roundtrip_fp4(keys_Ed) if self.simulate else keys_Ed, slots_E)

    def forward(self, x_TD: Tensor, qr: Tensor | Quantised, cache: LayerCache, batch: Batch) -> Tensor:
        """Entry numbers int32 [T, k], -1 where fewer are visible. Stores this call's index keys first."""
        assert cache.index_keys is not None
        assert cache.index_state is not None
        keys_Ed = self.compressor(x_TD, cache.index_state, batch)
        self._insert(keys_Ed, cache.index_keys, batch.entries[4].slots)
        cos, sin = batch.rope[True]
        q_THd = self._rotate(self.ops.rope(self.wq_b(qr).view(-1, self.heads, self.dim), cos, sin))
        if self.simulate or self.format == "fp4":
            q_THd = self.ops.roundtrip_fp4(q_THd)
        w_TH = self.weights_proj(x_TD).float() * self.weight_scale
        return self.ops.index_topk(
            q_THd, w_TH, cache.index_keys, batch.tables["entries4"], batch.cu_seqlens, batch.start_pos, ratio=4, topk=self.topk
        )
