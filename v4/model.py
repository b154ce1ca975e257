"""The graph: embedding, layers of attention and experts between hyper-connections, head, and the MTP block.

Knows no device and no backend; every computation is a call of a bound op. Shapes: T tokens, n streams, D hidden, V vocabulary,
R rows whose logits are wanted. Parameter names follow the hub checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from v4.attention import Attention
from v4.batch import Batch
from v4.cache import Cache, LayerCache
from v4.hyper import HyperConnection
from v4.linear import Linear, parameter
from v4.moe import MoE
from v4.norm import Norm
from v4.settings import Settings


class Block(nn.Module):
    """One layer: attention and experts, each between its own hyper-connection."""

    def __init__(self, s: Settings, ratio: int, hashed: bool) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = Norm(s, s.config.hidden_size), Norm(s, s.config.hidden_size)
        self.attn, self.ffn = Attention(s, ratio), MoE(s, hashed)
        self.hc_attn = HyperConnection(self, "hc_attn", s.ops, s.config)
        self.hc_ffn = HyperConnection(self, "hc_ffn", s.ops, s.config)

    def forward(self, streams_TnD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """[T, n, D] -> [T, n, D]; the residual of the experts is the output of the attention sublayer."""
        x_TD, post, comb = self.hc_attn.pre(streams_TnD)
        streams_TnD = self.hc_attn.post(self.attn(self.attn_norm(x_TD), batch, cache), streams_TnD, post, comb)
        x_TD, post, comb = self.hc_ffn.pre(streams_TnD)
        return self.hc_ffn.post(self.ffn(self.ffn_norm(x_TD), batch.ids), streams_TnD, post, comb)


class Embedding(nn.Module):
    """Token embedding [V, D]."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.weight = parameter((s.config.vocab_size, s.config.hidden_size), s.dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return nn.functional.embedding(ids_T, self.weight)


class MTPBlock(Block):
    """Next-token prediction block: streams at position t and token t+1 give streams for token t+2 (specification section 2.3)."""

    def __init__(self, s: Settings, ratio: int) -> None:
        super().__init__(s, ratio, hashed=False)
        d = s.config.hidden_size
        self.enorm, self.hnorm, self.norm = Norm(s, d), Norm(s, d), Norm(s, d)
        self.e_proj = Linear(s.ops, d, d, dtype=s.dtype, kind=s.linears)
        self.h_proj = Linear(s.ops, d, d, dtype=s.dtype, kind=s.linears)
        self.hc_head = HyperConnection(self, "hc_head", s.ops, s.config, head=True)

    def draft(self, embedded_TD: Tensor, streams_TnD: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Embedding of the next tokens and the four streams before the head -> streams [T, n, D]."""
        t, n, d = streams_TnD.shape
        e_TD = self.e_proj(self.enorm(embedded_TD))
        h_TnD = self.h_proj(self.hnorm(streams_TnD).view(t * n, d)).view(t, n, d)
        return self(e_TD[:, None] + h_TnD, batch, cache)


class Model(nn.Module):
    """DeepSeek-V4 main network and its MTP blocks."""

    def __init__(self, s: Settings, *, mtp: bool = True) -> None:
        super().__init__()
        c = s.config
        self.settings, self.config, self.ops = s, c, s.ops
        count = c.num_hidden_layers
        self.ratios = tuple(c.ratio(i) for i in range(count))
        self.mtp_ratios = tuple(c.ratio(count + i) for i in range(c.num_nextn_predict_layers if mtp else 0))
        end = s.at("head")
        self.end_ops = end.ops
        self.embed = Embedding(s)
        self.layers = nn.ModuleList(Block(s.at(f"layers.{i}"), m, c.is_hash(i)) for i, m in enumerate(self.ratios))
        self.norm = Norm(end, c.hidden_size)
        self.hc_head = HyperConnection(self, "hc_head", end.ops, c, head=True)
        self.head = Linear(end.ops, c.vocab_size, c.hidden_size, dtype=s.dtype)
        self.mtp = nn.ModuleList(MTPBlock(s.at(f"mtp.{i}"), m) for i, m in enumerate(self.mtp_ratios))

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Streams [T, n, D] after the last layer, before the head; stores this call's rows in `cache`."""
        return self.run(batch, cache.layers)

    def run(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """`forward` with the tensors of the cache only."""
        x_TD = self.embed(batch.ids)
        streams_TnD = x_TD[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            streams_TnD = layer(streams_TnD, batch, layer_cache)
        return streams_TnD

    def logits(self, streams_RnD: Tensor) -> Tensor:
        """Streams of the wanted rows -> logits fp32 [R, V]."""
        return self.end_ops.linear(self.norm(self.hc_head.head(streams_RnD)), self.head.weight, out_dtype=torch.float32)

    @property
    def _drafter(self) -> MTPBlock:
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        return block

    def draft(self, streams_TnD: Tensor, next_ids_T: Tensor, batch: Batch, cache: Cache) -> Tensor:
        """One MTP step: streams at each position and the token after it -> streams [T, n, D] that predict one token further."""
        return self._drafter.draft(self.embed(next_ids_T), streams_TnD, batch, cache.layers[0])

    def draft_logits(self, streams_RnD: Tensor) -> Tensor:
        """Logits fp32 [R, V] of MTP streams, through the block's own head collapse and norm and the shared LM head."""
        block = self._drafter
        return self.end_ops.linear(block.norm(block.hc_head.head(streams_RnD)), self.head.weight, out_dtype=torch.float32)
