"""The ten traps as faults: each is planted by replacing a bound op of the model, or a piece of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import v4.packing
import v4.rope
from tests import spec_formulas
from tests.trap_checks import frequencies, model
from v4.model import Model

Plant = Callable[[pytest.MonkeyPatch], None]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def in_op(op: str, wrap: Wrap, numerics: str = "exact") -> Plant:
    """Replace a bound op by `wrap(op)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        ops = model(numerics).binding.ops
        patch.setattr(ops, op, wrap(getattr(ops, op)))

    return plant


def together(*plants: Plant) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for one in plants:
            one(patch)

    return plant


def transposed(hc_post: Callable[..., Any]) -> Callable[..., Any]:
    return lambda y, streams, post, comb: hc_post(y, streams, post, comb.transpose(1, 2).contiguous())


def rows_last(hc_pre: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        x, post, comb = hc_pre(*args, **kwargs)
        return x, post, comb / comb.sum(-1, keepdim=True)

    return call


def tables(target: bool, source: bool) -> Plant:
    """Use the rotary frequencies of one layer kind (compressed or not) for the other."""
    return lambda patch: patch.setitem(model().runner.tables.by_kind, target, model().runner.tables.by_kind[source])


def amplitude(patch: pytest.MonkeyPatch) -> None:
    compressed, rows = model().runner.tables.by_kind[True], v4.rope.rows

    def louder(frequency_R2: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        gain = 1.2773 if frequency_R2 is compressed else 1.0
        cos, sin = rows(frequency_R2, positions_S)
        return cos * gain, sin * gain

    patch.setattr(v4.rope, "rows", louder)


def half_split(rotate: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> Tensor:
        half = cos.shape[-1]
        low, high = x[..., -2 * half : -half], x[..., -half:]
        y = rotate(torch.cat([x[..., : -2 * half], torch.stack([low, high], -1).flatten(-2)], -1), cos, sin, **kwargs)
        turned = y[..., -2 * half :]
        return torch.cat([y[..., : -2 * half], turned[..., 0::2], turned[..., 1::2]], -1)

    return call


def no_inverse(rope: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, cos, sin, inverse=False: x if inverse else rope(x, cos, sin)


def halves_swapped(compress: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["ratio"] == 4:
            c = norm.shape[0]
            wkv, wgate, ape = wkv.roll(c, 0), wgate.roll(c, 0), ape.roll(c, 1)
        return compress(x, wkv, wgate, ape, norm, *args, **kwargs)

    return call


def bias_halves_swapped(compress: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return compress(x, wkv, wgate, ape.roll(ape.shape[1] // 2, 1) if kwargs["ratio"] == 4 else ape, *args, **kwargs)

    return call


def turned_at_the_last_token(compress: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        *front, cos, sin, state, table, cu_seqlens, start_pos = args
        more = frequencies() * (kwargs["ratio"] - 1)
        cos, sin = cos * more.cos() - sin * more.sin(), sin * more.cos() + cos * more.sin()
        return compress(*front, cos, sin, state, table, cu_seqlens, start_pos, **kwargs)

    return call


def late_csa(index_topk: Callable[..., Any]) -> Callable[..., Any]:
    def call(q_THd: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = index_topk(q_THd, *args, **kwargs)
        return index.masked_fill(index >= (torch.arange(len(q_THd)) // 4)[:, None], -1)

    return call


def late_hca(attention: Callable[..., Any]) -> Callable[..., Any]:
    def call(q_THC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["ratio"] == 128:
            entries, position = torch.arange(len(q_THC) // 128, dtype=torch.int32), torch.arange(len(q_THC))
            kwargs["cmp_index"] = torch.where(entries < (position // 128)[:, None], entries, -1).int()
        return attention(q_THC, *args, **kwargs)

    return call


def no_q_norm(q_norm_rope: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, cos, sin, eps: model().binding.ops.rope(q, cos, sin)


def weighted_q_norm(q_norm_rope: Callable[..., Any]) -> Callable[..., Any]:
    def call(q: Tensor, cos: Tensor, sin: Tensor, *, eps: float) -> Tensor:
        weight = 1 + 0.3 * torch.linspace(-1, 1, q.shape[-1])
        return model().binding.ops.rope(weight * q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps), cos, sin)

    return call


def symmetric_routed(moe_mlp: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
        y = torch.zeros_like(x)
        for k in range(ids.shape[1]):
            e = ids[:, k].long()
            a, b = torch.einsum("td,tid->ti", x, w13[e]).clamp(-limit, limit).chunk(2, -1)
            y += weights[:, k, None] * torch.einsum("ti,tdi->td", torch.nn.functional.silu(a) * b, w2[e])
        return y

    return call


def symmetric_shared(swiglu: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gate_up, *, limit, row_weight=None: swiglu(gate_up.clamp(-limit, limit), limit=limit, row_weight=row_weight)


def unclamped(swiglu: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gate_up, *, limit, row_weight=None: swiglu(gate_up, limit=1e9, row_weight=row_weight)


def weight_after_w2(experts: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rows, weight, *args, **kw: experts(rows, torch.ones_like(weight), *args, **kw) * weight[:, None].to(rows.dtype)


def queries_only(hadamard: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: hadamard(x) if x.dim() == 3 else x


def keys_only(hadamard: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: x if x.dim() == 3 else hadamard(x)


def groups_of_16(roundtrip: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, **kw: spec_formulas.fp4(x, 16)


def no_sentinels(index_topk: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: index_topk(*args, **kwargs).clamp_min(0)


def scaled_sink(attention: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, rows, table, sink, *args, **kw: attention(q, rows, table, sink * kw["scale"], *args, **kw)


def no_sink(attention: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, rows, table, sink, *args, **kw: attention(q, rows, table, sink - 1e4, *args, **kw)


def two_softmaxes(attention: Callable[..., Any]) -> Callable[..., Any]:
    def call(q_THC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache, table, index, ratio = (kwargs.pop(k) for k in ("cmp_cache", "cmp_table", "cmp_index", "ratio"))
        out = attention(q_THC, *args, **kwargs)
        if cache is None:
            return out
        entries, position = torch.arange(len(q_THC) // ratio), torch.arange(len(q_THC))
        rows_EC = cache[table[0].long()[entries // cache.shape[1]], entries % cache.shape[1]]
        seen = entries < ((position + 1) // ratio)[:, None]
        if index is not None:
            seen &= (index[:, :, None] == entries).any(1)
        scores = torch.einsum("thc,ec->the", q_THC, rows_EC) * kwargs["scale"]
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        return out + weights @ rows_EC

    return call


def equal_hash_weights(gate_hash: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, scale: float) -> tuple[Tensor, Tensor]:
        weights, ids = gate_hash(*args, scale=scale)
        return torch.full_like(weights, scale / weights.shape[1]), ids

    return call


def hash_experts_by_score(gate_hash: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, tid2eid: Tensor, ids: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return model().binding.ops.gate_topk(x, weight, torch.zeros(len(weight)), topk=tid2eid.shape[1], scale=scale)

    return call


def collapsed_mtp_input(patch: pytest.MonkeyPatch) -> None:
    draft = Model.draft

    def call(self: Model, streams_TnD: Tensor, *args: Any) -> Tensor:
        return draft(self, self.norm(self.hc_head.head(streams_TnD))[:, None].expand_as(streams_TnD).contiguous(), *args)

    patch.setattr(Model, "draft", call)


def scales_as_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(v4.packing, "e8m0_values", lambda scale: scale.view(torch.uint8).float())


def high_nibble_first(patch: pytest.MonkeyPatch) -> None:
    table = v4.packing._fp4_table

    def swapped(dtype: torch.dtype) -> Tensor:
        return table(dtype).view(dtype).view(256, 2).flip(1).contiguous().view(table(dtype).dtype).flatten()

    patch.setattr(v4.packing, "_fp4_table", swapped)
