"""Faults and legal variants of the norms. Shapes: x [..., D], weight [D]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import legal, mutant

_LOW = (torch.bfloat16,)
Normed = Callable[[Tensor, float], Tensor]


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _weighted(normed: Normed, *, plus: float = 0.0, weight_of: Callable[[Tensor], Tensor] = lambda w: w) -> Any:
    def body(call: Any, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return ((weight_of(weight.float()) + plus) * normed(x.float(), eps)).to(x.dtype)

    return body


def _plain(normed: Normed) -> Any:
    def body(call: Any, x: Tensor, *, eps: float) -> Tensor:
        return normed(x.float(), eps).to(x.dtype)

    return body


def _added(normed: Normed) -> Any:
    def body(call: Any, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float()
        return (weight.float() * normed(total, eps)).to(x.dtype), total.to(x.dtype)

    return body


def _outside(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


def _fewer(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1) + eps)


def _centred(x: Tensor, eps: float) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)


def _tail_lost(x: Tensor, eps: float) -> Tensor:
    n = max(x.shape[-1] * 15 // 16, 1)
    return x * torch.rsqrt(x[..., :n].square().sum(-1, keepdim=True) / x.shape[-1] + eps)


def _low_squares(x: Tensor, eps: float) -> Tensor:
    total = torch.zeros(*x.shape[:-1], 1)
    for part in x.square().split(16, -1):
        total = (total + part.sum(-1, keepdim=True)).bfloat16().float()
    return x * torch.rsqrt(total / x.shape[-1] + eps)


def _absolute(x: Tensor, eps: float) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + eps)


for _name, _what, _normed in (
    ("eps_times_10", "epsilon is 1e-5 where 1e-6 is asked for", lambda x, eps: _unit(x, 10 * eps)),
    ("eps_lost", "epsilon is left away", lambda x, eps: torch.nan_to_num(_unit(x, 0.0))),
    ("eps_outside", "epsilon is added behind the root", _outside),
    ("fewer", "the mean divides by D - 1", _fewer),
    ("centred", "the mean is subtracted, as in a layer norm", _centred),
    ("tail_not_squared", "the last sixteenth of the row is not in the mean", _tail_lost),
    ("squares_bf16", "squares are summed in a bf16 accumulator, 16 at a time", _low_squares),
    ("absolute", "the mean of absolute values is used", _absolute),
):
    mutant("rms_norm", _name, _what)(_weighted(_normed))
    mutant("unit_rms_norm", _name, _what)(_plain(_normed))
    mutant("add_rms_norm", _name, _what)(_added(_normed))

mutant("rms_norm", "weight_plus_one", "the weight is taken as a difference from 1")(_weighted(_unit, plus=1.0))
mutant("rms_norm", "weight_lost", "the weight is left away")(_weighted(_unit, weight_of=torch.ones_like))
mutant("rms_norm", "weight_of_next_channel", "weights are read one channel further")(
    _weighted(_unit, weight_of=lambda w: w.roll(-1))
)
mutant("rms_norm", "cast_before_weight", "the normed row is rounded to bf16 before the weight", dtypes=_LOW)(
    _weighted(lambda x, eps: _unit(x, eps).bfloat16().float())
)


@mutant("add_rms_norm", "residual_lost", "x is normed without the residual")
def _residual_lost(call: Any, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return (weight.float() * _unit(x.float(), eps)).to(x.dtype), (x.float() + residual.float()).to(x.dtype)


@mutant("add_rms_norm", "residual_returned", "the residual comes back unchanged")
def _residual_back(call: Any, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return call(x, residual, weight, eps=eps)[0], residual.clone()


@mutant("add_rms_norm", "residual_twice", "the residual is added twice")
def _residual_twice(call: Any, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    return call(x + residual, residual, weight, eps=eps)


def _reversed(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.flip(-1).square().mean(-1, keepdim=True) + eps)


def _by_halves(x: Tensor, eps: float) -> Tensor:
    left, right = (part.square().sum(-1, keepdim=True) for part in x.tensor_split(2, -1))
    return x * torch.rsqrt((left + right) / x.shape[-1] + eps)


for _name, _what, _normed in (
    ("reversed", "squares summed in the other order, division by the root", _reversed),
    ("halves", "two halves of the row summed by themselves", _by_halves),
):
    legal("rms_norm", _name, _what)(_weighted(_normed))
    legal("unit_rms_norm", _name, _what)(_plain(_normed))
    legal("add_rms_norm", _name, _what)(_added(_normed))


@legal("add_rms_norm", "sum_rounded_first", "the sum is rounded to the storage type before it is normed")
def _rounded_first(call: Any, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return (weight.float() * _unit(total.float(), eps)).to(x.dtype), total
