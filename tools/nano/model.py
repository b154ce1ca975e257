"""The differentiable DeepSeek-V4: same parameters and arithmetic as the inference graph, over batches of whole sequences.

Shapes: B rows, T tokens, N = B*T, n streams, D hidden, E experts, I expert width, V vocabulary, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.nano import fake
from tools.nano.attention import Attention
from tools.nano.layers import Linear, Mode, Norm, Tables, matrix, tables
from v4.config import Config


class Hyper(nn.Module):
    """Parameters of one hyper-connection; exported as NAME_fn, NAME_scale, NAME_base."""

    def __init__(self, c: Config, mode: Mode, number: int, *, head: bool = False) -> None:
        super().__init__()
        n = c.hc_mult
        self.mode, self.config = mode, c
        rows = n if head else (2 + n) * n
        self.fn = nn.Parameter(torch.randn(rows, n * c.hidden_size) * (n * c.hidden_size) ** -0.5)
        self.scale = nn.Parameter(torch.full((1 if head else 3,), 0.1))
        pre = torch.full((n,), -2.0) if not head else torch.full((n,), -1.1)
        if not head:
            pre[number % n] = 0.5
        comb = torch.full((n, n), -2.0) + 4 * torch.eye(n)
        self.base = nn.Parameter(pre if head else torch.cat([pre, torch.zeros(n), comb.flatten()]))

    def pre(self, streams_NnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sublayer input [N, D], post [N, n], comb [N, n, n]."""
        c = self.config
        x, post, logits = self.mode.fused.hc_coefficients(streams_NnD, self.fn, self.scale, self.base, c.rms_norm_eps, c.hc_eps)
        return x, post, self.mode.fused.sinkhorn(logits, c.hc_sinkhorn_iters, c.hc_eps)

    def collapse(self, streams_NnD: Tensor) -> Tensor:
        """[N, n, D] -> [N, D]."""
        c = self.config
        return self.mode.fused.hc_head(streams_NnD, self.fn, self.scale, self.base, c.rms_norm_eps, c.hc_eps)


class Gate(nn.Module):
    """Routing weights of all experts, zero where not chosen."""

    def __init__(self, c: Config, mode: Mode, hashed: bool) -> None:
        super().__init__()
        self.hashed, self.topk, self.scale = hashed, c.num_experts_per_tok, c.routed_scaling_factor
        self.weight = matrix(c.n_routed_experts, c.hidden_size, gain=0.5)
        self.tid2eid: Tensor
        self.bias: Tensor
        if hashed:
            order = torch.rand(c.vocab_size, c.n_routed_experts).argsort(1)
            self.register_buffer("tid2eid", order[:, : self.topk].contiguous())
        else:
            self.register_buffer("bias", torch.zeros(c.n_routed_experts))

    def forward(self, x_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Weights fp32 [N, E] and the share of choices that each expert got, fp32 [E]."""
        # in the type of the activations: an fp32 product with so few columns has a slow gradient
        s = F.softplus(F.linear(x_ND, self.weight.to(x_ND.dtype)).float()).sqrt()
        sel = self.tid2eid[ids_N] if self.hashed else (s.detach() + self.bias).topk(self.topk, -1).indices
        g = torch.zeros_like(s).scatter(-1, sel, 1.0) * s
        load = (g.detach() > 0).float().mean(0) / self.topk
        return g / g.sum(-1, keepdim=True) * self.scale, load


class Experts(nn.Module):
    """All routed experts as two products over every token; unchosen ones get weight zero."""

    def __init__(self, c: Config, mode: Mode) -> None:
        super().__init__()
        self.mode, self.limit = mode, c.swiglu_limit
        e, d, i = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.w1, self.w3 = matrix(i, d, count=e), matrix(i, d, count=e)
        self.w2 = matrix(d, i, count=e, gain=0.5)

    def forward(self, x_ND: Tensor, g_NE: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        weights: list[Tensor] = [self.w1, self.w2, self.w3]
        x = x_ND
        if self.mode.quantise:
            weights, x = [fake.fp4(w) for w in weights], self.mode.fused.fp8_activation(x)
        w1, w2, w3 = weights
        a = F.linear(x, w1.flatten(0, 1).to(x.dtype)).unflatten(-1, (w1.shape[0], -1))
        b = F.linear(x, w3.flatten(0, 1).to(x.dtype)).unflatten(-1, (w1.shape[0], -1))
        h = self.mode.fused.swiglu(a, b, self.limit, g_NE[..., None])
        if self.mode.quantise:
            h = self.mode.fused.fp8_activation(h)
        return h.flatten(1) @ w2.transpose(1, 2).flatten(0, 1).to(x.dtype)


class Shared(nn.Module):
    """The expert every token passes."""

    def __init__(self, c: Config, mode: Mode) -> None:
        super().__init__()
        i = c.moe_intermediate_size * c.n_shared_experts
        self.mode, self.limit = mode, c.swiglu_limit
        self.w1, self.w3 = Linear(mode, i, c.hidden_size, packed=True), Linear(mode, i, c.hidden_size, packed=True)
        self.w2 = Linear(mode, c.hidden_size, i, packed=True, gain=0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return self.w2(self.mode.fused.swiglu(self.w1(x_ND), self.w3(x_ND), self.limit))


class MoE(nn.Module):
    """Routed plus shared experts."""

    def __init__(self, c: Config, mode: Mode, hashed: bool) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = Gate(c, mode, hashed), Experts(c, mode), Shared(c, mode)

    def forward(self, x_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> [N, D], and the load of the experts."""
        g_NE, load = self.gate(x_ND, ids_N)
        return self.experts(x_ND, g_NE) + self.shared_experts(x_ND), load


class Block(nn.Module):
    """One layer between its hyper-connections."""

    def __init__(self, c: Config, mode: Mode, number: int, ratio: int, hashed: bool) -> None:
        super().__init__()
        self.mode = mode
        self.attn_norm, self.ffn_norm = Norm(c, mode, c.hidden_size), Norm(c, mode, c.hidden_size)
        self.attn, self.ffn = Attention(c, mode, ratio), MoE(c, mode, hashed)
        self.hc_attn, self.hc_ffn = Hyper(c, mode, 2 * number), Hyper(c, mode, 2 * number + 1)

    def forward(self, streams_NnD: Tensor, ids_BT: Tensor, at: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """[N, n, D] -> [N, n, D], the indexer's loss, the experts' load."""
        b, t = ids_BT.shape
        x, post, comb = self.hc_attn.pre(streams_NnD)
        y, index_loss = self.attn(self.attn_norm(x).view(b, t, -1), at)
        streams_NnD = self.mode.fused.hc_post(y.flatten(0, 1), streams_NnD, post, comb)
        x, post, comb = self.hc_ffn.pre(streams_NnD)
        y, load = self.ffn(self.ffn_norm(x), ids_BT.flatten())
        return self.mode.fused.hc_post(y, streams_NnD, post, comb), index_loss, load


class MTP(Block):
    """Predicts one token further from the streams and the next token."""

    def __init__(self, c: Config, mode: Mode, number: int, ratio: int) -> None:
        super().__init__(c, mode, number, ratio, hashed=False)
        d = c.hidden_size
        self.enorm, self.hnorm, self.norm = Norm(c, mode, d), Norm(c, mode, d), Norm(c, mode, d)
        self.e_proj, self.h_proj = Linear(mode, d, d, packed=True), Linear(mode, d, d, packed=True)
        self.hc_head = Hyper(c, mode, 0, head=True)


class Output(NamedTuple):
    """Hidden states before the head fp [N, D] of the model and of the MTP block (None without), losses and loads by layer."""

    hidden: Tensor
    mtp: Tensor | None
    index_losses: list[Tensor]
    loads: list[Tensor]


class Nano(nn.Module):
    """Main network and MTP block. `dtype` is the type of activations; parameters are fp32."""

    def __init__(self, c: Config, *, mode: Mode | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.mode, self.dtype = c, mode or Mode(), dtype
        count, m = c.num_hidden_layers, self.mode
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, m, i, c.ratio(i), c.is_hash(i)) for i in range(count))
        self.norm, self.hc_head = Norm(c, m, c.hidden_size), Hyper(c, m, 0, head=True)
        self.head = Linear(m, c.vocab_size, c.hidden_size, gain=0.5)
        self.mtp = nn.ModuleList(MTP(c, m, count + i, c.ratio(count + i)) for i in range(c.num_nextn_predict_layers))
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, ids_BT: Tensor, *, draft: bool = True) -> Output:
        """Hidden states of every position; position t of the MTP block has seen token t+1 (the last one sees padding id 0)."""
        at = tables(self.config, ids_BT.shape[1], ids_BT.device)
        embedded = self.embed(ids_BT).to(self.dtype).flatten(0, 1)
        streams = embedded[:, None].expand(-1, self.config.hc_mult, -1).contiguous()
        losses, loads = [], []
        for layer in self.layers:
            streams, loss, load = layer(streams, ids_BT, at)
            losses.append(loss)
            loads.append(load)
        hidden = self.norm(self.hc_head.collapse(streams))
        if not draft or not len(self.mtp):
            return Output(hidden, None, losses, loads)
        block = self.mtp[0]
        assert isinstance(block, MTP)
        following = F.pad(ids_BT[:, 1:], (0, 1))
        e = block.e_proj(block.enorm(self.embed(following).to(self.dtype).flatten(0, 1)))
        y, loss, load = block(e[:, None] + block.h_proj(block.hnorm(streams)), following, at)
        return Output(hidden, block.norm(block.hc_head.collapse(y)), [*losses, loss], [*loads, load])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> fp32 [N, V]."""
        return self.head(hidden_ND).float()

    @torch.no_grad()
    def balance(self, loads: list[Tensor], speed: float) -> None:
        """Move the selection biases of the learned gates against their load (no gradient, no loss term)."""
        blocks = [*self.layers, *self.mtp]
        for block, load in zip(blocks, loads, strict=False):
            assert isinstance(block, Block)
            gate = block.ffn.gate
            if not gate.hashed:
                gate.bias += speed * torch.sign(load.mean() - load)
