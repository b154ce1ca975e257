"""Differentiable attention of one layer over whole sequences: window by blocks, compressed entries dense under a mask.

Shapes: B rows, T tokens, D hidden, H heads, C head width, G output groups, E entries, W window, Hi index heads, d index width.
Parameter names are those of the checkpoint; the arithmetic is that of v4/attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.nano import fake
from tools.nano.layers import Linear, Mode, Norm, Tables, matrix
from v4.config import Config


class Selection(NamedTuple):
    """What the indexer says: scores fp32 [B, T, E] (-inf where not visible), and the mask of usable entries bool [B, T, E]."""

    scores: Tensor
    usable: Tensor


class Compressor(nn.Module):
    """Entries [B, E, c] of a sequence, normalised and rotated (specification section 6)."""

    def __init__(self, c: Config, mode: Mode, ratio: int, width: int) -> None:
        super().__init__()
        self.mode, self.ratio, self.width = mode, ratio, width
        w = width * (2 if ratio == 4 else 1)
        self.wkv, self.wgate = Linear(mode, w, c.hidden_size), Linear(mode, w, c.hidden_size)
        self.ape = nn.Parameter(torch.zeros(ratio, w))
        self.norm = Norm(c, mode, width)

    def forward(self, x_BTD: Tensor, tables: Tables) -> Tensor:
        """[B, T, D] -> [B, T // m, c]."""
        m, count = self.ratio, x_BTD.shape[1] // self.ratio
        x = x_BTD[:, : count * m]
        k = self.wkv(x).unflatten(1, (count, m))
        s = self.wgate(x).float().unflatten(1, (count, m)) + self.ape
        if m == 4:
            c = self.width
            k = torch.cat([F.pad(k[:, :-1, :, :c], (0, 0, 0, 0, 1, 0)), k[..., c:]], 2)
            s = torch.cat([F.pad(s[:, :-1, :, :c], (0, 0, 0, 0, 1, 0), value=float("-inf")), s[..., c:]], 2)
        pooled = self.mode.fused.pool(k, s).to(x_BTD.dtype)
        cos, sin = tables.compressed
        return self.mode.fused.rope(self.norm(pooled), cos[: count * m : m], sin[: count * m : m])


class Indexer(nn.Module):
    """Scores of entries for each query (specification section 7); learns from the attention, and the model not from it."""

    def __init__(self, c: Config, mode: Mode) -> None:
        super().__init__()
        self.mode, self.heads, self.dim, self.topk = mode, c.index_n_heads, c.index_head_dim, c.index_topk
        self.wq_b = Linear(mode, self.heads * self.dim, c.q_lora_rank, packed=True)
        self.weights_proj = Linear(mode, self.heads, c.hidden_size)
        self.compressor = Compressor(c, mode, 4, self.dim)

    def _rounded(self, x: Tensor) -> Tensor:
        if not self.mode.quantise:
            return x
        return self.mode.fused.fp4_rows(x @ fake.hadamard_matrix(self.dim, x.device).to(x.dtype))

    def forward(self, x_BTD: Tensor, qr: Tensor, visible_TE: Tensor, tables: Tables) -> Selection:
        """Scores of all entries; usable are the visible ones, or the top-k of them when the mode is sparse."""
        x, qr = x_BTD.detach(), qr.detach()
        keys_BEd = self._rounded(self.compressor(x, tables))
        cos, sin = tables.compressed
        q = self.mode.fused.rope(self.wq_b(qr).unflatten(-1, (self.heads, self.dim)), cos, sin)
        q_BTHd = self._rounded(q)
        w_BTH = self.weights_proj(x).float() * (self.dim**-0.5 * self.heads**-0.5)
        dots = (q_BTHd.transpose(1, 2).flatten(1, 2) @ keys_BEd.mT).unflatten(1, (self.heads, -1))
        scores = self.mode.fused.index_scores(dots, w_BTH, visible_TE)
        usable = visible_TE.expand_as(scores)
        if self.mode.sparse and scores.shape[-1] > self.topk:
            best = scores.detach().topk(self.topk, -1).indices
            usable = torch.zeros_like(usable).scatter(-1, best, True) & usable
        return Selection(scores, usable)


class Attention(nn.Module):
    """SWA (ratio 0), CSA (4) or HCA (larger)."""

    def __init__(self, c: Config, mode: Mode, ratio: int) -> None:
        super().__init__()
        self.config, self.mode, self.ratio = c, mode, ratio
        self.heads, self.width, self.groups = c.num_attention_heads, c.head_dim, c.o_groups
        total = self.heads * self.width
        self.wq_a, self.q_norm = Linear(mode, c.q_lora_rank, c.hidden_size, packed=True), Norm(c, mode, c.q_lora_rank)
        self.wq_b = Linear(mode, total, c.q_lora_rank, packed=True)
        self.wkv, self.kv_norm = Linear(mode, self.width, c.hidden_size, packed=True), Norm(c, mode, self.width)
        self.wo_a = matrix(self.groups * c.o_lora_rank, total // self.groups)
        self.wo_b = Linear(mode, c.hidden_size, self.groups * c.o_lora_rank, packed=True, gain=0.5)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.compressor = Compressor(c, mode, ratio, self.width) if ratio else None
        self.indexer = Indexer(c, mode) if ratio == 4 else None

    def _stored(self, rows: Tensor) -> Tensor:
        if not self.mode.quantise:
            return rows
        return self.mode.fused.fp8_activation(rows, 64, self.width - self.config.qk_rope_head_dim)

    def _window(self, q_BTHC: Tensor, kv_BTC: Tensor) -> tuple[Tensor, Tensor]:
        w = self.mode.window or self.config.sliding_window
        b, t, h, c = q_BTHC.shape
        pad = -t % w
        q = F.pad(q_BTHC, (0, 0, 0, 0, 0, pad)).view(b, -1, w, h, c).transpose(2, 3)
        kv = F.pad(kv_BTC, (0, 0, 0, pad)).view(b, -1, w, c)
        keys = torch.cat([F.pad(kv[:, :-1], (0, 0, 0, 0, 1, 0)), kv], 2)
        # heads as further rows of one product: with a broadcast key every head would get a copy of it
        scores = ((q * self.width**-0.5).flatten(2, 3) @ keys.mT).unflatten(2, (h, w))
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)
        near = (j > i) & (j <= i + w)
        first = near & (j >= w)
        allowed = torch.cat([first[None], near[None].expand(kv.shape[1] - 1, -1, -1)])
        p, lse = self.mode.fused.part(scores, allowed[None, :, None])
        o = (p.flatten(2, 3) @ keys).unflatten(2, (h, w))
        o = o.transpose(2, 3).reshape(b, -1, h, c)[:, :t]
        return o.transpose(1, 2), lse.transpose(2, 3).reshape(b, -1, h, 1)[:, :t].transpose(1, 2)

    def forward(self, x_BTD: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> [B, T, D], and the indexer's loss (0 without an indexer)."""
        fused, eps = self.mode.fused, self.config.rms_norm_eps
        cos, sin = tables.compressed if self.ratio else tables.plain
        b, t, _ = x_BTD.shape
        qr = self.q_norm(self.wq_a(x_BTD))
        q_BTHC = fused.q_norm_rope(self.wq_b(qr).view(b, t, self.heads, self.width), cos, sin, eps)
        kv_BTC = self._stored(fused.rope(self.kv_norm(self.wkv(x_BTD)), cos, sin))
        o_w, lse_w = self._window(q_BTHC, kv_BTC)
        total = torch.logaddexp(lse_w, self.attn_sink.view(-1, 1, 1).float())
        loss = x_BTD.new_zeros((), dtype=torch.float32)
        if self.compressor is None or t < self.ratio:
            o = o_w * torch.exp(lse_w - total).to(o_w.dtype)
        else:
            o, loss = self._with_entries(x_BTD, qr, q_BTHC, o_w, lse_w, total, tables)
        o_BTHC = fused.rope(o.transpose(1, 2).contiguous(), cos, -sin)
        wo_a = fake.fp8_weight(self.wo_a) if self.mode.quantise else self.wo_a
        z = torch.einsum("btgi,gri->btgr", o_BTHC.reshape(b, t, self.groups, -1), wo_a.to(x_BTD.dtype).unflatten(0, (self.groups, -1)))
        return self.wo_b(z.flatten(2)), loss

    def _with_entries(
        self, x_BTD: Tensor, qr: Tensor, q_BTHC: Tensor, o_w: Tensor, lse_w: Tensor, total: Tensor, tables: Tables
    ) -> tuple[Tensor, Tensor]:
        assert self.compressor is not None
        t = x_BTD.shape[1]
        entries_BEC = self._stored(self.compressor(x_BTD, tables))
        ready = (torch.arange(t, device=x_BTD.device) + 1) // self.ratio
        usable = torch.arange(entries_BEC.shape[1], device=x_BTD.device) < ready[:, None]
        chosen = None
        if self.indexer is not None:
            chosen = self.indexer(x_BTD, qr, usable, tables)
            usable = chosen.usable[:, None]
        rows = (q_BTHC.transpose(1, 2) * self.width**-0.5).flatten(1, 2)
        scores = (rows @ entries_BEC.mT).unflatten(1, (self.heads, t))
        p_c, lse_c = self.mode.fused.part(scores, usable)
        o_c = (p_c.flatten(1, 2) @ entries_BEC).unflatten(1, (self.heads, t))
        total = torch.logaddexp(total, lse_c)
        share = torch.exp(lse_c - total)
        o = o_w * torch.exp(lse_w - total).to(o_w.dtype) + o_c * share.to(o_c.dtype)
        if chosen is None or not self.training:
            return o, x_BTD.new_zeros((), dtype=torch.float32)
        return o, self.mode.fused.index_loss(p_c, share, chosen.scores, chosen.usable)
