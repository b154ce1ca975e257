"""Mixture of experts: hash or learned routing, routed experts, shared expert.

Shapes: T tokens, D hidden, E experts, K experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4.linear import Linear, blocks, parameter
from v4.settings import Settings


class Gate(nn.Module):
    """Routing scores; experts come from the token id (hash layers) or from score plus bias (specification section 9)."""

    def __init__(self, s: Settings, hashed: bool) -> None:
        super().__init__()
        c = s.config
        self.ops, self.hashed, self.topk, self.scale = s.ops, hashed, c.num_experts_per_tok, c.routed_scaling_factor
        self.weight = parameter((c.n_routed_experts, c.hidden_size), s.dtype)
        if hashed:
            self.tid2eid = parameter((c.vocab_size, c.num_experts_per_tok), torch.int64)
        else:
            self.bias = parameter((c.n_routed_experts,), torch.float32)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Weights fp32 [T, K] and expert ids int32 [T, K]."""
        if self.hashed:
            return self.ops.gate_hash(x_TD, self.weight, self.tid2eid, ids_T, scale=self.scale)
        return self.ops.gate_topk(x_TD, self.weight, self.bias, topk=self.topk, scale=self.scale)


class Experts(nn.Module):
    """Routed experts, stacked: w13 [E, 2I, D] (gate rows first), w2 [E, D, I]; packed kinds carry scales s13 and s2."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        c = s.config
        n, d, i = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.ops, self.kind, self.limit = s.ops, s.experts, c.swiglu_limit
        self.topk = c.num_experts_per_tok
        if self.kind == "dense":
            self.w13, self.w2 = parameter((n, 2 * i, d), s.dtype), parameter((n, d, i), s.dtype)
        elif self.kind in ("fp4", "mx"):
            self.w13, self.w2 = parameter((n, 2 * i, d // 2), torch.uint8), parameter((n, d, i // 2), torch.uint8)
            self.s13 = parameter((n, 2 * i, d // 32), torch.float8_e8m0fnu)
            self.s2 = parameter((n, d, i // 32), torch.float8_e8m0fnu)
        elif self.kind == "int8":
            self.w13, self.w2 = parameter((n, 2 * i, d), torch.int8), parameter((n, d, i), torch.int8)
            wide = torch.bfloat16 if s.dtype == torch.bfloat16 else torch.float32
            self.s13, self.s2 = parameter((n, 2 * i), wide), parameter((n, d), wide)
        else:
            self.w13, self.w2 = parameter((n, 2 * i, d), torch.float8_e4m3fn), parameter((n, d, i), torch.float8_e4m3fn)
            self.s13 = parameter((n, 2 * blocks(i), blocks(d)), torch.float8_e8m0fnu)
            self.s2 = parameter((n, blocks(d), blocks(i)), torch.float8_e8m0fnu)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, fp32 [T, D]."""
        ops = self.ops
        if self.kind == "dense":
            return ops.moe_mlp(x_TD, ids_TK, weights_TK, self.w13, self.w2, limit=self.limit)
        rows, row_weight, counts, index = ops.moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=self.w13.shape[0])
        run = {"fp4": ops.grouped_experts_fp4, "fp8": ops.grouped_experts_fp8, "int8": ops.grouped_experts_int8}[self.kind]
        rows = run(rows, row_weight, counts, self.w13, self.s13, self.w2, self.s2, limit=self.limit)
        return ops.moe_combine(rows, index, tokens=x_TD.shape[0], topk=self.topk)


class SharedExpert(nn.Module):
    """The expert every token passes, with the same clamp: w13 [2I, D], w2 [D, I]."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        c = s.config
        i = c.moe_intermediate_size * c.n_shared_experts
        self.ops, self.limit = s.ops, c.swiglu_limit
        self.w13 = Linear(s.ops, 2 * i, c.hidden_size, dtype=s.dtype, kind=s.linears)
        self.w2 = Linear(s.ops, c.hidden_size, i, dtype=s.dtype, kind=s.linears)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.w2(self.ops.clamped_swiglu(self.w13(x_TD), limit=self.limit))


class MoE(nn.Module):
    """Routed plus shared experts; one op for all of them where both are stored alike."""

    def __init__(self, s: Settings, hashed: bool) -> None:
        super().__init__()
        self.whole = {"int8": s.ops.moe_int8, "mx": s.ops.moe_mx}.get(s.experts) if s.experts == s.linears else None
        self.gate = Gate(s, hashed)
        self.experts = Experts(s)
        self.shared_experts = SharedExpert(s)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """[T, D] and token ids [T] -> [T, D]; routed sum in fp32, one rounding after the shared expert is added."""
        weights_TK, ids_TK = self.gate(x_TD, ids_T)
        e, shared = self.experts, self.shared_experts
        if self.whole is not None:
            a, b = shared.w13, shared.w2
            weights = (e.w13, e.s13, e.w2, e.s2, a.weight, a.scale, b.weight, b.scale)
            y_TD: Tensor = self.whole(x_TD, ids_TK, weights_TK, *weights, limit=e.limit)
            return y_TD
        routed_TD = e(x_TD, ids_TK, weights_TK)
        return (routed_TD + shared(x_TD)).to(x_TD.dtype)
