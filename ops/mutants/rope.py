"""Faults and legal variants of the rotations. Shapes: x [T, C] or [T, H, C], cos and sin [T, R2]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.mutants.core import BOTH, legal, mutant

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def _tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    shape = (cos.shape[0], *[1] * (x.dim() - 2), cos.shape[1])
    return cos.view(shape), sin.view(shape)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = _tables(x, cos, sin)
    plain = x.shape[-1] - 2 * cos.shape[1]
    a, b = x[..., plain::2], x[..., plain + 1 :: 2]
    return torch.cat((x[..., :plain], torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)), -1)


def _half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = _tables(x, cos, sin)
    n = cos.shape[1]
    plain = x.shape[-1] - 2 * n
    a, b = x[..., plain : plain + n], x[..., plain + n :]
    return torch.cat((x[..., :plain], a * c - b * s, a * s + b * c), -1)


def _first_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = 2 * cos.shape[1]
    return torch.cat((_pairs(x[..., :n], cos, sin), x[..., n:]), -1)


def _pair_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = _pairs(x, cos, sin)
    plain = x.shape[-1] - 2 * cos.shape[1]
    return torch.cat((turned[..., :plain], turned[..., plain:].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)), -1)


def _plain_lost(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    plain = x.shape[-1] - 2 * cos.shape[1]
    turned = _pairs(x, cos, sin)
    return torch.cat((turned[..., :plain] * 0, turned[..., plain:]), -1)


def _in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The second channel of a pair is computed from the first one's new value."""
    c, s = _tables(x, cos, sin)
    plain = x.shape[-1] - 2 * cos.shape[1]
    a, b = x[..., plain::2], x[..., plain + 1 :: 2]
    new = a * c - b * s
    return torch.cat((x[..., :plain], torch.stack((new, new * s + b * c), -1).flatten(-2)), -1)


_TURNS: tuple[tuple[str, str, Turn], ...] = (
    ("half_split", "channels are paired with those half a width away instead of their neighbours", _half_split),
    ("first_channels", "the first channels are rotated instead of the last", _first_channels),
    ("pair_swapped", "the channels of a pair change places", _pair_swapped),
    ("plain_lost", "channels without rotation are left at zero", _plain_lost),
    ("in_place", "the second channel of a pair uses the new value of the first", _in_place),
    ("cos_sin_swapped", "cosine and sine change places", lambda x, c, s: _pairs(x, s, c)),
    ("token_before", "each token takes the angles of the one before it", lambda x, c, s: _pairs(x, c.roll(1, 0), s.roll(1, 0))),
    ("tables_bf16", "the tables are kept in bf16", lambda x, c, s: _pairs(x, c.bfloat16().float(), s.bfloat16().float())),
    ("next_frequency", "each pair takes the frequency of the next one", lambda x, c, s: _pairs(x, c.roll(-1, 1), s.roll(-1, 1))),
    ("amplitude", "the tables carry the amplitude of YaRN", lambda x, c, s: _pairs(x, c * 1.277, s * 1.277)),
)


def _rope(turn: Turn) -> Any:
    def body(call: Any, x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
        return turn(x.float(), cos_TR2, -sin_TR2 if inverse else sin_TR2).to(x.dtype)

    return body


def _query(turn: Turn, normed: Callable[[Tensor, float], Tensor] | None = None, *, after: bool = False) -> Any:
    def unit(x: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    norm = normed or unit

    def body(call: Any, q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
        x = q_THC.float()
        y = norm(turn(x, cos_TR2, sin_TR2), eps) if after else turn(norm(x, eps), cos_TR2, sin_TR2)
        return y.to(q_THC.dtype)

    return body


for _name, _what, _turn in _TURNS:
    mutant("rope", _name, _what)(_rope(_turn))
    # a normed query may be rounded to bf16 before it is rotated, which is as much as rounded tables change
    mutant("q_norm_rope", _name, _what, dtypes=(torch.float32,) if _name == "tables_bf16" else BOTH)(_query(_turn))


@mutant("rope", "inverse_ignored", "the inverse rotation turns the same way as the forward one")
def _ignored(call: Any, x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    return call(x, cos_TR2, sin_TR2)


@mutant("rope", "backwards", "every rotation turns the other way")
def _backwards(call: Any, x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    return call(x, cos_TR2, sin_TR2, inverse=not inverse)


def _all_heads(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean((-1, -2), keepdim=True) + eps)


mutant("q_norm_rope", "norm_lost", "queries are not normed")(_query(_pairs, lambda x, eps: x))
mutant("q_norm_rope", "norm_over_heads", "one norm over all heads of a token")(_query(_pairs, _all_heads))
mutant("q_norm_rope", "eps_times_10", "epsilon is 1e-5 where 1e-6 is asked for")(
    _query(_pairs, lambda x, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 10 * eps))
)
mutant("q_norm_rope", "sum_for_mean", "the sum of squares is not divided by the width")(
    _query(_pairs, lambda x, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps))
)

legal("q_norm_rope", "norm_after", "the rotation first: it keeps the norm")(_query(_pairs, after=True))
legal("q_norm_rope", "reversed", "squares summed in the other order, division by the root")(
    _query(_pairs, lambda x, eps: x / torch.sqrt(x.flip(-1).square().mean(-1, keepdim=True) + eps))
)


def _complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = _tables(x, cos, sin)
    plain = x.shape[-1] - 2 * cos.shape[1]
    turned = torch.view_as_complex(x[..., plain:].unflatten(-1, (-1, 2)).contiguous()) * torch.complex(c, s)
    return torch.cat((x[..., :plain], torch.view_as_real(turned).flatten(-2)), -1)


legal("rope", "complex", "pairs as complex numbers")(_rope(_complex))


@legal("rope", "fp64", "computed in float64 and rounded once")
def _double(call: Any, x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    sin = -sin_TR2 if inverse else sin_TR2
    return _pairs(x.double(), cos_TR2.double(), sin.double()).to(x.dtype)
