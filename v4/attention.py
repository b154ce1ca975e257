"""Attention of one layer: low-rank queries, one shared KV head, window plus compressed rows, grouped output projection.

Shapes: T tokens, D hidden, H heads, C head width, G output groups, E entries completed by the call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4.batch import Batch
from v4.cache import LayerCache
from v4.compressor import Compressor
from v4.indexer import Indexer
from v4.linear import Linear, parameter
from v4.norm import Norm
from v4.settings import Settings


class Attention(nn.Module):
    """SWA (ratio 0), CSA (ratio 4) or HCA (larger ratio) attention (specification sections 4 to 8)."""

    def __init__(self, s: Settings, ratio: int) -> None:
        super().__init__()
        c = s.config
        self.ops, self.config, self.ratio = s.ops, c, ratio
        self.simulate, self.format = s.simulate, s.format.kv
        self.heads, self.width, self.groups = c.num_attention_heads, c.head_dim, c.o_groups
        self.scale = self.width**-0.5

        def linear(n_out: int, n_in: int) -> Linear:
            return Linear(s.ops, n_out, n_in, dtype=s.dtype, kind=s.linears)

        self.wq_a = linear(c.q_lora_rank, c.hidden_size)
        self.q_norm = Norm(s, c.q_lora_rank)
        self.wq_b = linear(self.heads * self.width, c.q_lora_rank)
        self.wkv = linear(self.width, c.hidden_size)
        self.kv_norm = Norm(s, self.width)
        self.wo_a = parameter((self.groups, c.o_lora_rank, self.heads * self.width // self.groups), s.dtype)
        self.wo_b = linear(c.hidden_size, self.groups * c.o_lora_rank)
        self.attn_sink = parameter((self.heads,), torch.float32)
        self.compressor = Compressor(s, ratio, self.width) if ratio else None
        self.indexer = Indexer(s) if ratio == 4 else None

    def _insert(self, rows_RC: Tensor, cache: Tensor, slots_R: Tensor) -> None:
        if self.format == "fp8":
            self.ops.cache_insert_fp8(cache, rows_RC, slots_R, rope_dim=self.config.qk_rope_head_dim)
            return
        if self.simulate:
            rows_RC = self.ops.roundtrip_fp8(rows_RC, channels=self.width - self.config.qk_rope_head_dim)
        self.ops.cache_insert(cache, rows_RC, slots_R)

    def forward(self, x_TD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """[T, D] -> [T, D]; stores this call's rows in `cache` before attending."""
        ops, eps = self.ops, self.config.rms_norm_eps
        cos, sin = batch.rope[bool(self.ratio)]
        x = self.wq_a.prepare(x_TD)
        qr = self.wq_b.normed(self.wq_a(x), self.q_norm)
        q_THC = ops.q_norm_rope(self.wq_b(qr).view(-1, self.heads, self.width), cos, sin, eps=eps)
        self._insert(ops.norm_rope(self.wkv(x), self.kv_norm.weight, cos, sin, eps=eps), cache.window, batch.window_slots)
        table = index_Tk = None
        if self.compressor is not None:
            assert cache.state is not None
            assert cache.entries is not None
            self._insert(self.compressor(x_TD, cache.state, batch), cache.entries, batch.entries[self.ratio].slots)
            table = batch.tables[f"entries{self.ratio}"]
            if self.indexer is not None:
                index_Tk = self.indexer(x_TD, qr, cache, batch)
        o_THC = ops.sparse_attention(
            q_THC,
            cache.window,
            batch.tables["window"],
            self.attn_sink,
            batch.cu_seqlens,
            batch.start_pos,
            scale=self.scale,
            window=self.config.sliding_window,
            cmp_cache=cache.entries,
            cmp_table=table,
            cmp_index=index_Tk,
            ratio=self.ratio,
        )
        o_THC = ops.rope(o_THC, cos, sin, inverse=True)
        z_TGr = ops.grouped_linear(o_THC.view(o_THC.shape[0], self.groups, -1), self.wo_a)
        return self.wo_b(z_TGr.flatten(1))
