"""Faults and legal variants of choosing the next token. Shapes: logits [B, V], all else [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import arguments, legal, mutant

_FULL = (torch.float32,)

# ---- argmax ---------------------------------------------------------------------------------------------------------


def _last_best(logits: Tensor) -> Tensor:
    return logits.shape[1] - 1 - logits.float().flip(1).argmax(1)


def _first_best(logits: Tensor) -> Tensor:
    best = logits == logits.amax(-1, keepdim=True)
    return best.int().argmax(-1)


def _best_of_blocks(logits: Tensor, size: int, *, later_wins: bool) -> Tensor:
    """The best of each block of `size` channels, then the best of those."""
    best = torch.stack([_first_best(part) + i * size for i, part in enumerate(logits.split(size, 1))], 1)
    values = logits.gather(1, best)
    place = _last_best(values) if later_wins else _first_best(values)
    return best.gather(1, place[:, None])[:, 0]


def _best_of_lanes(logits: Tensor) -> Tensor:
    """32 lanes that each look at every 32nd logit; the first lane wins a tie, wherever its logit lies."""
    v = logits.shape[1]
    padded = torch.nn.functional.pad(logits.float(), (0, -v % 32), value=-torch.inf).unflatten(1, (-1, 32))
    lane = padded.amax(1).argmax(1)
    row = padded.gather(2, lane[:, None, None].expand(-1, padded.shape[1], 1))[..., 0].argmax(1)
    return row * 32 + lane


def _whole_tiles(logits: Tensor) -> Tensor:
    v = logits.shape[1] // 16 * 16 or logits.shape[1]
    return _first_best(logits[:, :v])


def _from_zero(logits: Tensor) -> Tensor:
    return torch.where(logits.amax(-1) > 0, _first_best(logits), 0)


def _second(logits: Tensor) -> Tensor:
    return logits.float().sort(descending=True, stable=True).indices[:, min(1, logits.shape[1] - 1)]


def _masked_first(logits: Tensor) -> Tensor:
    return _first_best(torch.where(torch.arange(logits.shape[1]) == 0, -torch.inf, logits.float()))


def _chosen(choose: Callable[[Tensor], Tensor]) -> Any:
    def body(call: Any, logits_BV: Tensor) -> Tensor:
        return choose(logits_BV) if len(logits_BV) else call(logits_BV)

    return body


for _name, _what, _choose in (
    ("ties_last", "equal logits: the highest index", _last_best),
    (
        "ties_later_block",
        "of equal logits in several blocks the last block wins",
        lambda x: _best_of_blocks(x, 16, later_wins=True),
    ),
    ("ties_first_lane", "of equal logits the one of the first lane wins", _best_of_lanes),
    ("tail_lost", "logits behind whole tiles of 16 are not looked at", _whole_tiles),
    ("starts_at_zero", "the largest so far starts at 0, so that negative logits never win", _from_zero),
    ("magnitude", "the largest magnitude wins", lambda x: _first_best(x.abs())),
    ("second", "the second largest logit", _second),
    ("smallest", "the smallest logit", lambda x: _first_best(-x)),
    ("one_further", "the index counts from 1", lambda x: _first_best(x) + 1),
    ("first_token_lost", "the loop begins at token 1", _masked_first),
    ("index_16_bits", "the index is kept in 16 bits", lambda x: _first_best(x) & 0xFFFF),
    ("next_row", "each row gets the token of the next one", lambda x: _first_best(x).roll(-1)),
    ("coarse", "logits are compared in FP8", lambda x: _first_best(x.to(torch.float8_e4m3fn).float())),
):
    mutant("argmax", _name, _what)(_chosen(_choose))
mutant("argmax", "through_bf16", "logits are compared in bf16", dtypes=_FULL)(lambda call, logits_BV: call(logits_BV.bfloat16()))
mutant("argmax", "int32", "the index has 32 bits")(lambda call, logits_BV: call(logits_BV).int())
legal("argmax", "blocks", "the best of each block of 16, then the first best of those")(
    lambda call, logits_BV: _best_of_blocks(logits_BV, 16, later_wins=False)
)
legal("argmax", "sorted", "the first of a stable sort")(
    lambda call, logits_BV: logits_BV.sort(descending=True, stable=True).indices[:, 0].contiguous()
)

# ---- sample ---------------------------------------------------------------------------------------------------------

Draw = Callable[[Tensor, float, int, float, float], int]


def _by_row(draw: Draw, greedy: Callable[[Tensor], Tensor] | None = _first_best) -> Any:
    """The op from draw(logits [V] in fp32, temperature, top_k, top_p, uniform); `greedy` None: temperature 0 is drawn as well."""

    def body(call: Any, logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
        columns = (temperature_B.tolist(), top_k_B.tolist(), top_p_B.tolist(), uniform_B.tolist())
        tokens = []
        for x, t, k, p, u in zip(logits_BV.float(), *columns, strict=True):
            tokens.append(int(greedy(x[None])[0]) if t == 0 and greedy else draw(x, t or 1.0, k, p, u))
        return torch.tensor(tokens, dtype=torch.int64)

    return body


def _draw(
    x: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    uniform: float,
    *,
    order: Callable[[Tensor], Tensor] = lambda x: x.sort(descending=True, stable=True).indices,
    softmax: Callable[[Tensor, float], Tensor] = lambda z, t: torch.softmax((z - z.max()) / t, 0),
    cumulate: Callable[[Tensor], Tensor] = lambda p: p.cumsum(0),
    top_p_kept: Callable[[Tensor, float], int] = lambda c, p: int(torch.searchsorted(c, torch.tensor(p))) + 1,
    k_first: bool = True,
    renormalised: bool = True,
) -> int:
    """One token by the contract, its parts replaceable."""
    indices = order(x)
    k = min(top_k, len(x)) if top_k > 0 else len(x)
    p = softmax(x[indices[:k]] if k_first else x[indices], temperature)
    cumulative = cumulate(p)
    kept = len(p) if top_p >= 1 else min(top_p_kept(cumulative, top_p), len(p))
    kept = max(min(kept, k), 1)
    mass = float(cumulative[kept - 1]) if renormalised else 1.0
    place = int(torch.searchsorted(cumulative, torch.tensor(uniform * mass), right=True))
    return int(indices[min(place, kept - 1)])


def _drawn(**parts: Any) -> Any:
    return _by_row(lambda x, t, k, p, u: _draw(x, t, k, p, u, **parts))


def _changed(**changes: Callable[[dict[str, Any]], Any]) -> Any:
    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments("sample", args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


def _running(p: Tensor, dtype: torch.dtype) -> Tensor:
    total, out = torch.zeros((), dtype=dtype), []
    for value in p.to(dtype):
        total = total + value
        out.append(total)
    return torch.stack(out).float()


def _low_running(p: Tensor) -> Tensor:
    return _running(p, torch.bfloat16) if len(p) <= 256 else p.cumsum(0)


def _place(x: Tensor, t: float, k: int, p: float, u: float) -> int:
    return int((x.sort(descending=True, stable=True).indices == _draw(x, t, k, p, u)).nonzero()[0, 0])


def _token_before(x: Tensor, t: float, k: int, p: float, u: float) -> int:
    return int(x.sort(descending=True, stable=True).indices[max(_place(x, t, k, p, u) - 1, 0)])


def _ties_descending(x: Tensor) -> Tensor:
    return len(x) - 1 - x.flip(0).sort(descending=True, stable=True).indices


def _reached(c: Tensor, p: float) -> int:
    return int(torch.searchsorted(c, torch.tensor(p)))


def _softmax_bf16(z: Tensor, t: float) -> Tensor:
    return torch.softmax((z - z.max()) / t, 0).bfloat16().float()


def _softmax_fp16(z: Tensor, t: float) -> Tensor:
    return torch.softmax(((z - z.max()) / t).half().float(), 0).half().float()


for _name, _what, _body in (
    ("temperature_lost", "the temperature is not applied", _by_row(lambda x, t, k, p, u: _draw(x, 1.0, k, p, u))),
    ("temperature_inverted", "logits are multiplied by the temperature", _by_row(lambda x, t, k, p, u: _draw(x, 1 / t, k, p, u))),
    ("temperature_of_next_row", "each row has the temperature of the next one", _changed(temperature_B=lambda a: a["temperature_B"].roll(-1))),
    ("greedy_lost", "temperature 0 is taken for 1", _by_row(_draw, None)),
    ("always_greedy", "every row takes its largest logit", _changed(temperature_B=lambda a: a["temperature_B"] * 0)),
    ("ties_last", "of equal largest logits a greedy row takes the last", _by_row(_draw, _last_best)),
    ("top_k_more", "one token more than top_k is kept", _by_row(lambda x, t, k, p, u: _draw(x, t, k + 1 if k else 0, p, u))),
    ("top_k_less", "one token less than top_k is kept", _by_row(lambda x, t, k, p, u: _draw(x, t, max(k - 1, 1) if k else 0, p, u))),
    ("top_k_lost", "top_k is not applied", _changed(top_k_B=lambda a: a["top_k_B"] * 0)),
    ("top_k_0_is_1", "a top_k of 0 keeps one token", _changed(top_k_B=lambda a: a["top_k_B"].clamp(min=1))),
    ("top_p_lost", "top_p is not applied", _changed(top_p_B=lambda a: a["top_p_B"] * 0 + 1)),
    ("top_p_short", "the token that reaches top_p is not kept", _drawn(top_p_kept=_reached)),
    ("top_p_long", "one token more than reaches top_p is kept", _drawn(top_p_kept=lambda c, p: _reached(c, p) + 2)),
    ("top_p_before_top_k", "top_p counts the probability of tokens that top_k takes away", _drawn(k_first=False)),
    ("not_renormalised", "the kept tokens' probabilities are not divided by their sum", _drawn(renormalised=False)),
    ("vocabulary_order", "tokens are drawn in the order of the vocabulary", _drawn(order=lambda x: torch.arange(len(x)))),
    ("ascending", "the least likely tokens come first", _drawn(order=lambda x: x.sort(stable=True).indices)),
    ("ties_descending", "equal logits come by descending index", _drawn(order=_ties_descending)),
    ("uniform_turned", "1 - uniform is used", _by_row(lambda x, t, k, p, u: _draw(x, t, k, p, 1 - u))),
    ("uniform_of_next_row", "each row takes the number of the next one", _changed(uniform_B=lambda a: a["uniform_B"].roll(-1))),
    ("probabilities_bf16", "probabilities are stored in bf16", _drawn(softmax=_softmax_bf16)),
    ("sum_bf16", "the running sum is kept in bf16", _drawn(cumulate=_low_running)),
    ("logits_fp16", "probabilities are computed in fp16", _drawn(softmax=_softmax_fp16)),
    ("token_before", "the token before the drawn one is returned", _by_row(_token_before)),
    ("place_returned", "the place in the sorted list is returned instead of the token", _by_row(_place)),
):  # fmt: skip
    mutant("sample", _name, _what)(_body)


def _of_all(z: Tensor, t: float) -> Tensor:
    e = torch.exp((z - z.max()) / t)
    return e / e.sum()


legal("sample", "fp64", "the distribution in float64")(
    lambda call, logits_BV, temperature_B, top_k_B, top_p_B, uniform_B: call(
        logits_BV.double(), temperature_B, top_k_B, top_p_B, uniform_B
    )
)
legal("sample", "by_exp", "exponentials divided by their sum")(_drawn(softmax=_of_all))
legal("sample", "summed_in_double", "the running sum in float64")(_drawn(cumulate=lambda p: p.double().cumsum(0).float()))
legal("sample", "summed_in_blocks", "the running sum block by block of 64")(
    _drawn(
        cumulate=lambda p: torch.cat([part.cumsum(0) + before for part, before in zip(p.split(64), _starts(p, 64), strict=True)])
    )
)


def _starts(p: Tensor, size: int) -> Tensor:
    sums = torch.stack([part.sum() for part in p.split(size)])
    return sums.cumsum(0) - sums
