"""Faults and legal variants of the clamped SwiGLU and of grouped experts in every storage format.

Shapes: rows [A, D] sorted by expert, gate and up [A, I], row_weight [A], counts [E], w13 [E, 2I, D], w2 [E, D, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ops.experts import _dense
from ops.experts_math import Weight, roundtrip_activation, segments
from ops.experts_quant import _fp4, _fp8, _fp8_pair
from ops.moe import _moe_combine, _moe_dispatch
from ops.mutants.core import arguments, legal, mutant
from ops.quant import dequant_fp8, quant_fp8

PACKED = ("grouped_experts_fp4", "grouped_experts_fp8")
EXPERTS = ("grouped_experts", *PACKED)
Hidden = Callable[[Tensor, Tensor, float, Tensor], Tensor]
Round = Callable[[Tensor], Tensor]
_FULL = (torch.float32,)


def _hidden(gate: Tensor, up: Tensor, limit: float, weight: Tensor) -> Tensor:
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight


def _trip(x: Tensor) -> Tensor:
    return roundtrip_activation(x, torch.float32)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Recipe:
    """How experts are computed, part by part; the defaults are the contract's.

    hidden(gate, up, limit, weight [n, 1]); `x` and `h` round the inputs of the two products where the op quantises, `x_plain` and
    `h_plain` where it does not; `after(y, weight)`; `rows(counts)` gives (expert whose weights are used, first row, end row).
    """

    hidden: Hidden = _hidden
    halves: Callable[[Tensor], Iterable[Tensor]] = lambda gate_up: gate_up.chunk(2, -1)
    x: Round = _trip
    h: Round = _trip
    x_plain: Round = _same
    h_plain: Round = _same
    first: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x @ w.T
    second: Callable[[Tensor, Tensor], Tensor] = lambda h, w: h @ w.T
    after: Callable[[Tensor, Tensor], Tensor] = lambda y, weight: y
    rows: Callable[[Tensor], Iterable[tuple[int, int, int]]] = segments

    def run(self, a: dict[str, Any], rows: Tensor, row_weight: Tensor, counts: Tensor, w13: Weight, w2: Weight) -> Tensor:
        """Outputs [A, D] in fp32."""
        quantise = a.get("quantize", "s13" in a)
        x = (self.x if quantise else self.x_plain)(rows.float())
        y = torch.zeros(rows.shape)
        for e, i, j in self.rows(counts):
            weight = row_weight[i:j, None]
            gate, up = self.halves(self.first(x[i:j], w13(e, torch.float32)))
            h = (self.h if quantise else self.h_plain)(self.hidden(gate, up, a["limit"], weight))
            y[i:j] = self.after(self.second(h, w2(e, torch.float32)), weight)
        return y


def weights_of(op: str, a: dict[str, Any]) -> tuple[Weight, Weight]:
    """Dense w13 and w2 of each expert."""
    if op == "grouped_experts_fp4":
        return _fp4(a["w13"], a["s13"]), _fp4(a["w2"], a["s2"])
    if op == "grouped_experts_fp8":
        return _fp8_pair(a["w13"], a["s13"]), _fp8(a["w2"], a["s2"])
    return _dense(a["w13"]), _dense(a["w2"])


def recipe(op: str, **parts: Any) -> Callable[..., Tensor]:
    """The op with parts of its recipe replaced."""
    made = Recipe(**parts)

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(op, args, kwargs)
        w = weights_of(op, a)
        if op != "moe_mlp":
            return made.run(a, a["rows_AD"], a["row_weight_A"], a["counts_E"], *w).to(a["rows_AD"].dtype)
        tokens, topk = a["ids_TK"].shape
        rows, weight, counts, index = _moe_dispatch(a["x_TD"], a["ids_TK"], a["weights_TK"], num_experts=len(a["w2"]))
        return _moe_combine(made.run(a, rows, weight, counts, *w), index, tokens=tokens, topk=topk)

    return body


def _swiglu(hidden: Hidden = _hidden, halves: Callable[[Tensor], Iterable[Tensor]] = lambda x: x.chunk(2, -1)) -> Any:
    def body(call: Any, gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
        gate, up = halves(gate_up_T2I.float())
        weight = torch.ones(len(gate)) if row_weight is None else row_weight
        return hidden(gate, up, limit, weight[:, None]).to(gate_up_T2I.dtype)

    return body


# ---- the activation and the routing weight --------------------------------------------------------------------------

_ACTIVATIONS: tuple[tuple[str, str, Hidden], ...] = (
    ("clamp_lost", "nothing is clamped", lambda g, u, m, w: silu(g) * u * w),
    ("gate_not_clamped", "the gate is not clamped", lambda g, u, m, w: silu(g) * u.clamp(-m, m) * w),
    ("gate_clamped_below", "the gate is clamped on both sides", lambda g, u, m, w: _hidden(g.clamp(min=-m), u, m, w)),
    ("up_clamped_above", "the up half is clamped above only", lambda g, u, m, w: silu(g.clamp(max=m)) * u.clamp(max=m) * w),
    ("clamp_after_silu", "the clamp comes after silu", lambda g, u, m, w: silu(g).clamp(max=m) * u.clamp(-m, m) * w),
    ("clamp_of_product", "the product is clamped", lambda g, u, m, w: (silu(g) * u).clamp(-m, m) * w),
    ("limit_7", "the limit is 7, whatever is asked for", lambda g, u, m, w: _hidden(g, u, 7.0, w)),
    ("halves_swapped", "gate and up change places", lambda g, u, m, w: _hidden(u, g, m, w)),
    ("gelu", "gelu instead of silu", lambda g, u, m, w: gelu(g.clamp(max=m)) * u.clamp(-m, m) * w),
    ("alpha", "silu has the factor 1.702 of another model", lambda g, u, m, w: _hidden(g * 1.702, u, 1.702 * m, w) / 1.702),
    ("up_plus_one", "1 is added to the up half, as in another model", lambda g, u, m, w: silu(g.clamp(max=m)) * (u.clamp(-m, m) + 1) * w),
    ("sigmoid", "the gate is a sigmoid, its own factor is lost", lambda g, u, m, w: g.clamp(max=m).sigmoid() * u.clamp(-m, m) * w),
    ("weight_lost", "the routing weight is not applied", lambda g, u, m, w: _hidden(g, u, m, w * 0 + 1)),
    ("weight_twice", "the routing weight is applied twice", lambda g, u, m, w: _hidden(g, u, m, w * w)),
    ("weight_of_next_row", "each row takes the weight of the next one", lambda g, u, m, w: _hidden(g, u, m, w.roll(-1, 0))),
    ("weight_in_clamp", "the routing weight multiplies the up half before its clamp", lambda g, u, m, w: _hidden(g, u * w, m, w * 0 + 1)),
)  # fmt: skip


def _interleaved(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up[..., 0::2], gate_up[..., 1::2]


for _op in (*EXPERTS, "moe_mlp"):
    for _name, _what, _part in _ACTIVATIONS:
        mutant(_op, _name, _what)(recipe(_op, hidden=_part))
    mutant(_op, "interleaved", "gate and up are taken to alternate")(recipe(_op, halves=_interleaved))
for _name, _what, _part in _ACTIVATIONS:
    mutant("clamped_swiglu", _name, _what)(_swiglu(_part))
mutant("clamped_swiglu", "interleaved", "gate and up are taken to alternate")(_swiglu(halves=_interleaved))
mutant("clamped_swiglu", "weight_bf16", "the routing weight is kept in bf16")(
    _swiglu(lambda g, u, m, w: _hidden(g, u, m, w.bfloat16().float()))
)
mutant("clamped_swiglu", "silu_bf16", "silu is stored in bf16 before the product")(
    _swiglu(lambda g, u, m, w: silu(g.clamp(max=m)).bfloat16().float() * u.clamp(-m, m) * w)
)
mutant("clamped_swiglu", "product_bf16", "the product is stored in bf16 before it is weighted")(
    _swiglu(lambda g, u, m, w: _hidden(g, u, m, w * 0 + 1).bfloat16().float() * w)
)

# ---- whose weights --------------------------------------------------------------------------------------------------


def _next_expert(counts: Tensor) -> Iterator[tuple[int, int, int]]:
    return (((e + 1) % len(counts), i, j) for e, i, j in segments(counts))


def _compacted(counts: Tensor) -> Iterator[tuple[int, int, int]]:
    return ((n, i, j) for n, (_, i, j) in enumerate(segments(counts)))


def _border(counts: Tensor) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    for e, i, j in segments(counts):
        out += [(out[-1][0] if out else e, i, i + 1), *([(e, i + 1, j)] if j - i > 1 else [])]
    return out


def _whole_tiles(counts: Tensor) -> Iterator[tuple[int, int, int]]:
    return ((e, i, i + (j - i) // 4 * 4 if j - i > 4 else j) for e, i, j in segments(counts))


def _last_expert_lost(counts: Tensor) -> list[tuple[int, int, int]]:
    return list(segments(counts))[:-1]


def _bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def _in_bf16(x: Tensor, w: Tensor) -> Tensor:
    acc = torch.zeros(len(x), len(w))
    for k in range(0, x.shape[1], 16):
        acc = _bf16(acc + x[:, k : k + 16] @ w[:, k : k + 16].T)
    return acc


def _without_last(x: Tensor, w: Tensor) -> Tensor:
    k = (x.shape[1] - 1) // 16 * 16 or x.shape[1] - 1
    return x[:, :k] @ w[:, :k].T


_FAULTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("next_expert", "rows go through the weights of the next expert", {"rows": _next_expert}),
    ("compacted", "experts without rows are not counted when weights are looked up", {"rows": _compacted}),
    ("border", "the first row of an expert goes through the weights of the one before", {"rows": _border}),
    ("rows_of_tail_lost", "rows behind whole tiles of 4 are not computed", {"rows": _whole_tiles}),
    ("last_expert_lost", "the loop over experts stops one early", {"rows": _last_expert_lost}),
    ("channels_lost", "the last channels of the hidden state are not multiplied", {"first": _without_last}),
    ("inner_lost", "the last channels of the activation are not multiplied", {"second": _without_last}),
    ("first_accumulator_bf16", "gate and up are summed in bf16 from tile to tile of 16", {"first": _in_bf16}),
    ("second_accumulator_bf16", "the second product is summed in bf16 from tile to tile of 16", {"second": _in_bf16}),
)
for _name, _what, _parts in _FAULTS:
    for _op in (*EXPERTS, "moe_mlp"):
        mutant(_op, _name, _what)(recipe(_op, **_parts))
for _op in (*EXPERTS, "moe_mlp"):
    mutant(_op, "hidden_bf16", "the activation is stored in bf16", dtypes=_FULL)(
        recipe(_op, h_plain=_bf16, h=lambda h: _trip(_bf16(h)))
    )

# ---- rounding of activations ----------------------------------------------------------------------------------------


def _groups_of(group: int) -> Round:
    return lambda x: dequant_fp8.reference(*quant_fp8.reference(x, group=group), group=group, dtype=torch.float32)


def _one_scale(x: Tensor) -> Tensor:
    return _groups_of(max(x.shape[1], 1))(x)


for _op in PACKED:
    mutant(_op, "rows_not_quantised", "rows are not rounded to FP8")(recipe(_op, x=_same))
    mutant(_op, "activation_not_quantised", "the activation is not rounded to FP8")(recipe(_op, h=_same))
    mutant(_op, "rows_by_64", "rows have a scale per 64 channels")(recipe(_op, x=_groups_of(64)))
    mutant(_op, "activation_by_64", "the activation has a scale per 64 channels")(recipe(_op, h=_groups_of(64)))
    mutant(_op, "rows_by_row", "rows have one scale each")(recipe(_op, x=_one_scale))
    mutant(_op, "activation_by_row", "the activation has one scale per row")(recipe(_op, h=_one_scale))
    mutant(
        _op, "weight_after_rounding", "the routing weight is applied behind the second product, so that other codes are rounded"
    )(recipe(_op, hidden=lambda g, u, m, w: _hidden(g, u, m, w * 0 + 1), after=lambda y, w: y * w))
    mutant(_op, "always_quantised", "activations are rounded even where none is asked for")(
        recipe(_op, x_plain=_trip, h_plain=_trip)
    )
    mutant(_op, "never_quantised", "activations are never rounded")(recipe(_op, x=_same, h=_same))

# ---- legal ----------------------------------------------------------------------------------------------------------


def _halved(x: Tensor, w: Tensor) -> Tensor:
    return sum((a @ b.T for a, b in zip(x.tensor_split(2, 1), w.tensor_split(2, 1), strict=True)), torch.zeros(()))


def _reversed(x: Tensor, w: Tensor) -> Tensor:
    return x.flip(1) @ w.flip(1).T


def _tiles(x: Tensor, w: Tensor) -> Tensor:
    acc = torch.zeros(len(x), len(w))
    for k in range(0, x.shape[1], 16):
        acc += x[:, k : k + 16] @ w[:, k : k + 16].T
    return acc


def _by_exp(g: Tensor, u: Tensor, m: float, w: Tensor) -> Tensor:
    g = g.clamp(max=m)
    return u.clamp(-m, m) * w * g / (1 + torch.exp(-g))


def _rounded_parts(g: Tensor, u: Tensor, m: float, w: Tensor) -> Tensor:
    return _bf16(_hidden(_bf16(g), _bf16(u), m, w))


_ALLOWED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("channels_reversed", "products summed in the other order", {"first": _reversed, "second": _reversed}),
    ("split", "two halves of each product by themselves, added", {"first": _halved, "second": _halved}),
    ("tiles", "tiles of 16 channels added one after the other", {"first": _tiles, "second": _tiles}),
    ("silu_by_exp", "silu as a quotient, the routing weight in between", {"hidden": _by_exp}),
    (
        "row_by_row",
        "one row after the other",
        {"rows": lambda c: ((e, r, r + 1) for e, i, j in segments(c) for r in range(i, j))},
    ),
)
for _name, _what, _parts in _ALLOWED:
    for _op in (*EXPERTS, "moe_mlp"):
        legal(_op, _name, _what)(recipe(_op, **_parts))
for _op in (*EXPERTS, "moe_mlp"):
    legal(_op, "stored", "gate, up and the activation are stored in bf16", dtypes=(torch.bfloat16,))(
        recipe(_op, hidden=_rounded_parts)
    )
for _op in ("grouped_experts", "moe_mlp"):
    legal(_op, "weight_behind", "the routing weight is applied behind the second product, in fp32")(
        recipe(_op, hidden=lambda g, u, m, w: _hidden(g, u, m, w * 0 + 1), after=lambda y, w: y * w)
    )
legal("clamped_swiglu", "silu_by_exp", "silu as a quotient, the routing weight in between")(_swiglu(_by_exp))
legal("clamped_swiglu", "weight_first", "the routing weight multiplies the gate's silu first")(
    _swiglu(lambda g, u, m, w: u.clamp(-m, m) * (silu(g.clamp(max=m)) * w))
)
