"""Faults and legal variants of dispatch and combine, alone and inside moe_mlp.

Shapes: x [T, D], ids and weights [T, K], rows [A = T*K, D], counts [E], row_index [A].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.moe import _moe_dispatch
from ops.mutants.core import arguments, legal, mutant
from ops.mutants.experts import Recipe, weights_of

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
_DISPATCH, _COMBINE = "moe_dispatch", "moe_combine"


def _changed(op: str, **changes: Callable[[dict[str, Any]], Any]) -> Any:
    """The correct op on changed arguments."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(op, args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


# ---- moe_dispatch ---------------------------------------------------------------------------------------------------


def _after(change: Callable[[Rows, dict[str, Any]], Rows]) -> Any:
    """moe_dispatch with its results changed."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Rows:
        found = change(call(*args, **kwargs), arguments(_DISPATCH, args, kwargs))
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous(), found[3].to(torch.int32).contiguous()

    return body


def _ordered(order: Callable[[Tensor], Tensor]) -> Any:
    """moe_dispatch with rows in the order that `order(flat ids)` gives."""

    def body(call: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> Rows:
        flat = order(ids_TK.flatten().long())
        counts = torch.bincount(ids_TK.flatten(), minlength=num_experts)
        return x_TD[flat // max(ids_TK.shape[1], 1)], weights_TK.flatten()[flat], counts, flat.to(torch.int32)

    return body


def _latest_first(ids: Tensor) -> Tensor:
    return len(ids) - 1 - ids.flip(0).sort(stable=True).indices


def _inclusive(counts: Tensor) -> Tensor:
    return counts.cumsum(0)


mutant(_DISPATCH, "latest_first", "rows of one expert come in the opposite order")(_ordered(_latest_first))
mutant(_DISPATCH, "descending", "rows are sorted from the last expert to the first")(
    _ordered(lambda ids: ids.sort(stable=True, descending=True).indices)
)
mutant(_DISPATCH, "not_sorted", "rows stay in the order of their tokens")(_ordered(lambda ids: torch.arange(len(ids))))
mutant(_DISPATCH, "ids_7_bits", "expert numbers are kept in 7 bits")(_ordered(lambda ids: (ids & 127).sort(stable=True).indices))
mutant(_DISPATCH, "weights_not_moved", "routing weights stay in the order of their tokens")(
    _after(lambda r, a: (r[0], a["weights_TK"].flatten(), r[2], r[3]))
)
mutant(_DISPATCH, "weights_bf16", "routing weights pass through bf16")(
    _after(lambda r, a: (r[0], r[1].bfloat16().float(), r[2], r[3]))
)
mutant(_DISPATCH, "token_for_flat", "row_index holds the token instead of the flat index")(
    _after(lambda r, a: (*r[:3], r[3] // max(a["ids_TK"].shape[1], 1)))
)
mutant(_DISPATCH, "index_by_choice", "row_index counts k*T + t instead of t*K + k")(
    _after(lambda r, a: (*r[:3], r[3] % max(a["ids_TK"].shape[1], 1) * len(a["x_TD"]) + r[3] // max(a["ids_TK"].shape[1], 1)))
)
mutant(_DISPATCH, "index_inverted", "row_index says where each flat index went instead of where each row comes from")(
    _after(lambda r, a: (*r[:3], r[3].long().argsort()))
)
mutant(_DISPATCH, "token_by_choice", "the token of a row is its flat index modulo T")(
    _after(lambda r, a: (a["x_TD"][r[3].long() % max(len(a["x_TD"]), 1)], *r[1:]))
)
mutant(_DISPATCH, "counts_summed", "counts are the running sum")(_after(lambda r, a: (*r[:2], _inclusive(r[2]), r[3])))
mutant(_DISPATCH, "counts_shifted", "counts start one expert later")(_after(lambda r, a: (*r[:2], r[2].roll(1), r[3])))
mutant(_DISPATCH, "counts_at_least_one", "experts without rows count one")(_after(lambda r, a: (*r[:2], r[2].clamp(min=1), r[3])))
mutant(_DISPATCH, "rows_bf16", "rows pass through bf16", dtypes=(torch.float32,))(
    _after(lambda r, a: (r[0].bfloat16().float(), *r[1:]))
)
mutant(_DISPATCH, "rows_weighted", "rows are multiplied by their routing weight")(
    _after(lambda r, a: ((r[0].float() * r[1][:, None]).to(r[0].dtype), *r[1:]))
)


@legal(_DISPATCH, "counting", "places counted expert by expert instead of sorted")
def _counting(call: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> Rows:
    flat = ids_TK.flatten()
    places = [torch.arange(0), *((flat == e).nonzero()[:, 0] for e in range(num_experts))]
    order = torch.cat(places)
    counts = torch.tensor([len(p) for p in places[1:]], dtype=torch.int64)
    return x_TD[order // max(ids_TK.shape[1], 1)], weights_TK.flatten()[order], counts, order.to(torch.int32)


legal(_DISPATCH, "by_key", "sorted by one number made of expert and flat index")(
    _ordered(lambda ids: (ids * max(len(ids), 1) + torch.arange(len(ids))).argsort())
)

# ---- moe_combine ----------------------------------------------------------------------------------------------------


def _summed(total: Callable[[Tensor], Tensor], empty: float = 0.0) -> Any:
    """moe_combine from total(rows [T, K, D] in fp32, those computed elsewhere `empty`) -> [T, D]."""

    def body(call: Any, rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
        flat = torch.full((tokens * topk, rows_AD.shape[1]), empty)
        flat[row_index_A.long()] = rows_AD.float()
        return total(flat.view(tokens, topk, rows_AD.shape[1]))

    return body


def _in_bf16(rows: Tensor) -> Tensor:
    acc = torch.zeros(rows.shape[0], rows.shape[2])
    for k in range(rows.shape[1]):
        acc = (acc + rows[:, k]).bfloat16().float()
    return acc


mutant(_COMBINE, "last_choice_lost", "the last expert of each token is not added")(_summed(lambda r: r[:, :-1].sum(1)))
mutant(_COMBINE, "first_choice_twice", "the first expert of each token is added twice")(_summed(lambda r: r.sum(1) + r[:, 0]))
mutant(_COMBINE, "mean", "the rows of a token are averaged")(_summed(lambda r: r.mean(1)))
mutant(_COMBINE, "overwritten", "each row overwrites the token's earlier ones instead of adding to them")(
    _summed(lambda r: r[:, -1])
)
mutant(_COMBINE, "largest", "the largest value is taken instead of the sum")(_summed(lambda r: r.amax(1)))
mutant(_COMBINE, "accumulator_bf16", "the sum is kept in bf16 from row to row")(_summed(_in_bf16))
mutant(_COMBINE, "missing_not_zero", "rows computed elsewhere hold what was in memory before")(_summed(lambda r: r.sum(1), 3.0))
mutant(_COMBINE, "by_choice", "the flat index is taken to be k*T + t")(
    _summed(lambda r: r.reshape(r.shape[1], r.shape[0], r.shape[2]).sum(0))
)
mutant(_COMBINE, "index_ignored", "rows are taken to be in the order of their tokens")(
    _changed(_COMBINE, row_index_A=lambda a: torch.arange(len(a["row_index_A"]), dtype=torch.int32))
)
mutant(_COMBINE, "index_inverted", "row_index is read as the row of each flat index")(
    _changed(_COMBINE, row_index_A=lambda a: a["row_index_A"].long().argsort().to(torch.int32))
)
mutant(_COMBINE, "next_token", "rows go to the token behind the right one")(_summed(lambda r: r.sum(1).roll(1, 0)))
mutant(_COMBINE, "result_bf16", "the sum is rounded to bf16 at the end")(_summed(lambda r: r.sum(1).bfloat16().float()))

legal(_COMBINE, "last_choice_first", "rows added from the last choice to the first")(_summed(lambda r: r.flip(1).sum(1)))
legal(_COMBINE, "halves", "two halves of the choices by themselves, added")(
    _summed(lambda r: r[:, : r.shape[1] // 2].sum(1) + r[:, r.shape[1] // 2 :].sum(1))
)


@legal(_COMBINE, "row_order", "rows added in the order in which the experts give them")
def _row_order(call: Any, rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
    return torch.zeros(tokens, rows_AD.shape[1]).index_add_(0, row_index_A.long() // topk, rows_AD.float())


# ---- the routing inside moe_mlp -------------------------------------------------------------------------------------


def _routed(
    dispatch: Callable[[Rows], Rows] = lambda r: r, combine: Callable[[Tensor], Tensor] = lambda r: r.sum(1)
) -> Callable[..., Tensor]:
    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments("moe_mlp", args, kwargs)
        tokens, topk = a["ids_TK"].shape
        rows, weight, counts, index = dispatch(_moe_dispatch(a["x_TD"], a["ids_TK"], a["weights_TK"], num_experts=len(a["w2"])))
        y = Recipe().run(a, rows, weight, counts, *weights_of("moe_mlp", a))
        flat = torch.zeros(tokens * topk, y.shape[1])
        flat[index.long()] = y
        return combine(flat.view(tokens, topk, -1)) if tokens else flat

    return body


mutant("moe_mlp", "weights_not_moved", "routing weights stay in the order of their tokens")(
    _routed(lambda r: (r[0], r[1][r[3].long().argsort()], r[2], r[3]))
)
mutant("moe_mlp", "index_inverted", "the inverse of the sorting order brings rows back to their tokens")(
    _routed(lambda r: (*r[:3], r[3].long().argsort()))
)
mutant("moe_mlp", "index_ignored", "rows are taken to be in the order of their tokens")(
    _routed(lambda r: (*r[:3], r[3].long().sort().values))
)
mutant("moe_mlp", "last_choice_lost", "the last expert of each token is not added")(_routed(combine=lambda r: r[:, :-1].sum(1)))
mutant("moe_mlp", "first_choice_twice", "the first expert of each token is added twice")(
    _routed(combine=lambda r: r.sum(1) + r[:, 0])
)
mutant("moe_mlp", "mean", "the experts of a token are averaged")(_routed(combine=lambda r: r.mean(1)))
mutant("moe_mlp", "weights_normalised", "routing weights are normalised once more")(
    _changed("moe_mlp", weights_TK=lambda a: a["weights_TK"] / a["weights_TK"].sum(-1, keepdim=True))
)
mutant("moe_mlp", "ids_of_next_token", "each token takes the experts of the next one")(
    _changed("moe_mlp", ids_TK=lambda a: a["ids_TK"].roll(-1, 0))
)
mutant("moe_mlp", "result_bf16", "the sum over experts is rounded to bf16", dtypes=(torch.float32,))(
    _routed(combine=lambda r: r.sum(1).bfloat16().float())
)
mutant("moe_mlp", "combine_bf16", "the sum over experts is kept in bf16", dtypes=(torch.float32,))(_routed(combine=_in_bf16))
legal("moe_mlp", "outputs_stored", "each expert's output is rounded to bf16 before the sum", dtypes=(torch.bfloat16,))(
    _routed(combine=lambda r: r.bfloat16().float().sum(1))
)
legal("moe_mlp", "combine_reversed", "experts added from the last choice to the first")(
    _routed(combine=lambda r: r.flip(1).sum(1))
)
