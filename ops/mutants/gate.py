"""Faults and legal variants of the expert gates.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import legal, mutant

Pair = tuple[Tensor, Tensor]
_BOTH = ("gate_topk", "gate_hash")


def _scores(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x.float() @ w.float().T).sqrt()


def _normal(s: Tensor, ids: Tensor, scale: float) -> Tensor:
    c = s.gather(1, ids.long())
    return c / c.sum(-1, keepdim=True) * scale


def _choice(value: Tensor, k: int) -> Tensor:
    return value.sort(dim=-1, descending=True, stable=True).indices[:, :k].to(torch.int32)


def _topk(make: Callable[[Tensor, Tensor, int, float], Pair], score: Callable[[Tensor, Tensor], Tensor] = _scores) -> Any:
    """gate_topk from make(scores [T, E], bias, k, scale)."""

    def body(call: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> Pair:
        return make(score(x_TD, weight_ED), bias_E, topk, scale)

    return body


def _hash(make: Callable[[Tensor, Tensor, float], Pair], score: Callable[[Tensor, Tensor], Tensor] = _scores) -> Any:
    """gate_hash from make(scores [T, E], ids of the table, scale)."""

    def body(call: Any, x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> Pair:
        return make(score(x_TD, weight_ED), tid2eid_VK[token_ids_T.long()].to(torch.int32), scale)

    return body


def _plain(s: Tensor, bias: Tensor, k: int, scale: float) -> Pair:
    ids = _choice(s + bias, k)
    return _normal(s, ids, scale), ids


def _with_ids(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Ids changed by change(ids, value), weights right for them."""

    def make(s: Tensor, bias: Tensor, k: int, scale: float) -> Pair:
        ids = change(_choice(s + bias, k), s + bias)
        return _normal(s, ids, scale), ids

    return _topk(make)


def _hash_ids(change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def make(s: Tensor, ids: Tensor, scale: float) -> Pair:
        ids = change(ids, s)
        return _normal(s, ids, scale), ids

    return _hash(make)


def _sigmoid(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(x.float() @ w.float().T)


def _softmax(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x.float() @ w.float().T, -1)


def _no_root(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x.float() @ w.float().T)


def _low_logits(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.softplus((x.float() @ w.float().T).bfloat16().float()).sqrt()


def _tail(x: Tensor, w: Tensor) -> Tensor:
    n = max(x.shape[1] * 31 // 32, 1)
    return _scores(x[:, :n], w[:, :n])


for _name, _what, _score in (
    ("sigmoid", "scores are sigmoid instead of sqrt(softplus), as in the model before", _sigmoid),
    ("softmax", "scores are a softmax over the experts", _softmax),
    ("no_root", "the square root of softplus is left away", _no_root),
    ("logits_bf16", "logits are stored in bf16", _low_logits),
    ("channels_lost", "the last channels of x are not multiplied", _tail),
):
    mutant("gate_topk", _name, _what)(_topk(_plain, _score))
    mutant("gate_hash", _name, _what)(_hash(lambda s, ids, scale: (_normal(s, ids, scale), ids), _score))

# ---- gate_topk ------------------------------------------------------------------------------------------------------


def _bias_in_weights(s: Tensor, bias: Tensor, k: int, scale: float) -> Pair:
    ids = _choice(s + bias, k)
    return _normal(s + bias, ids, scale), ids


def _not_normal(s: Tensor, bias: Tensor, k: int, scale: float) -> Pair:
    ids = _choice(s + bias, k)
    return s.gather(1, ids.long()) * scale, ids


def _all_normal(s: Tensor, bias: Tensor, k: int, scale: float) -> Pair:
    ids = _choice(s + bias, k)
    return s.gather(1, ids.long()) / s.sum(-1, keepdim=True) * scale, ids


mutant("gate_topk", "bias_in_weights", "the selection bias leaks into the routing weights")(_topk(_bias_in_weights))
mutant("gate_topk", "bias_lost", "experts are chosen without the selection bias")(
    _topk(lambda s, b, k, scale: _plain(s, b * 0, k, scale))
)
mutant("gate_topk", "not_normalised", "weights are not divided by their sum")(_topk(_not_normal))
mutant("gate_topk", "normalised_over_all", "weights are divided by the sum over all experts")(_topk(_all_normal))
mutant("gate_topk", "scale_lost", "the routed scaling factor is left away")(_topk(lambda s, b, k, scale: _plain(s, b, k, 1.0)))
mutant("gate_topk", "duplicate", "the best expert fills the last place as well")(
    _with_ids(lambda ids, v: torch.cat((ids[:, :-1], ids[:, :1]), 1))
)
mutant("gate_topk", "tokens_swapped", "the choices of the first and the last token change places")(
    _with_ids(lambda ids, v: torch.cat((ids[-1:], ids[1:-1], ids[:1])) if len(ids) > 1 else ids)
)
mutant("gate_topk", "next_best", "the last place goes to the expert behind the right one")(
    _with_ids(
        lambda ids, v: torch.cat((ids[:, :-1], _choice(v, ids.shape[1] + 1)[:, -1:]), 1) if v.shape[1] > ids.shape[1] else ids
    )
)
mutant("gate_topk", "ties_last", "equal values go to the highest index")(
    _with_ids(lambda ids, v: (v.shape[1] - 1 - _choice(v.flip(1), ids.shape[1])).to(torch.int32))
)
mutant("gate_topk", "ascending", "the list runs from the worst to the best")(_with_ids(lambda ids, v: ids.flip(1)))

# ---- gate_hash ------------------------------------------------------------------------------------------------------

mutant("gate_hash", "not_normalised", "weights are not divided by their sum")(
    _hash(lambda s, ids, scale: (s.gather(1, ids.long()) * scale, ids))
)
mutant("gate_hash", "scale_lost", "the routed scaling factor is left away")(
    _hash(lambda s, ids, scale: (_normal(s, ids, 1.0), ids))
)
mutant("gate_hash", "equal_weights", "all experts of a token weigh the same")(
    _hash(lambda s, ids, scale: (torch.full(ids.shape, scale / ids.shape[1]), ids))
)
mutant("gate_hash", "next_token", "each token takes the experts of the one behind it")(_hash_ids(lambda ids, s: ids.roll(-1, 0)))
mutant("gate_hash", "sorted", "the ids of a token are sorted, its weights are not")(
    _hash(lambda s, ids, scale: (_normal(s, ids, scale), ids.sort(1).values))
)
mutant("gate_hash", "one_off", "ids count from 1")(_hash_ids(lambda ids, s: (ids + 1) % s.shape[1]))
mutant("gate_hash", "table_bf16", "the table is loaded through bf16, which rounds ids above 256")(
    _hash_ids(lambda ids, s: ids.bfloat16().to(torch.int32).clamp(max=s.shape[1] - 1))
)
mutant("gate_hash", "chosen_by_score", "experts are the best by score, as in layers that learn their routing")(
    _hash_ids(lambda ids, s: _choice(s, ids.shape[1]))
)


@mutant("gate_hash", "position_for_token", "the table is read at the token's place in the call instead of its id")
def _position(call: Any, x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float) -> Pair:
    place = torch.arange(len(token_ids_T)) % len(tid2eid_VK)
    return call(x_TD, weight_ED, tid2eid_VK, place, scale=scale)


# ---- legal ----------------------------------------------------------------------------------------------------------


def _flipped(x: Tensor, w: Tensor) -> Tensor:
    return _scores(x.flip(1), w.flip(1))


def _halves(x: Tensor, w: Tensor) -> Tensor:
    h = x.shape[1] // 2
    logits = x[:, :h].float() @ w[:, :h].float().T + x[:, h:].float() @ w[:, h:].float().T
    return torch.nn.functional.softplus(logits).sqrt()


for _name, _what, _score in (
    ("channels_reversed", "products summed in the other order", _flipped),
    ("split", "two halves of the channels by themselves, added", _halves),
):
    legal("gate_topk", _name, _what)(_topk(_plain, _score))
    legal("gate_hash", _name, _what)(_hash(lambda s, ids, scale: (_normal(s, ids, scale), ids), _score))
