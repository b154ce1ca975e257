"""Faults and legal variants of the hyper-connections.

Shapes: T tokens, n streams, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.hyper import sinkhorn
from ops.mutants.core import legal, mutant

_LOW = torch.bfloat16
Three = tuple[Tensor, Tensor, Tensor]
Mix = Callable[[Tensor, Tensor, float], Tensor]


def _mixes(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    f = x.flatten(1).float()
    return (f @ fn.T) * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)


def _pre(
    *, mixes: Mix = _mixes, comb_of: Any = sinkhorn, post_factor: float = 2.0, order: tuple[int, int, int] = (0, 1, 2),
    transpose: bool = False, with_base: bool = True, activation: Any = torch.sigmoid,
) -> Any:  # fmt: skip
    """hc_pre in fp32 with one of its parts replaced."""

    def body(
        call: Any, streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
    ) -> Three:
        n, u = streams_TnD.shape[1], mixes(streams_TnD, fn, norm_eps)
        s, b = [scale[i] for i in order], base if with_base else base * 0
        pre = activation(u[:, :n] * s[0] + b[:n]) + hc_eps
        post = post_factor * torch.sigmoid(u[:, n : 2 * n] * s[1] + b[n : 2 * n])
        logits = (u[:, 2 * n :] * s[2] + b[2 * n :]).view(-1, n, n)
        comb = comb_of(logits.transpose(1, 2) if transpose else logits, hc_eps, iters)
        x = (pre[:, :, None] * streams_TnD.float()).sum(1)
        return x.to(streams_TnD.dtype), post, comb.contiguous()

    return body


def _one_more(logits: Tensor, eps: float, iters: int) -> Tensor:
    return sinkhorn(logits, eps, iters + 1)


def _rows_last(logits: Tensor, eps: float, iters: int) -> Tensor:
    return sinkhorn(logits.transpose(1, 2), eps, iters).transpose(1, 2)


def _low_rounds(logits: Tensor, eps: float, iters: int) -> Tensor:
    p = (torch.softmax(logits, -1) + eps).to(_LOW).float()
    for i in range(iters):
        p = (p / (p.sum(-2, keepdim=True) + eps)).to(_LOW).float()
        if i + 1 < iters:
            p = (p / (p.sum(-1, keepdim=True) + eps)).to(_LOW).float()
    return p


def _per_stream(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    return (x.flatten(1).float() @ fn.T) * torch.rsqrt(x[:, 0].float().square().mean(-1, keepdim=True) + eps)


def _stream_minor(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    return _mixes(x.transpose(1, 2).contiguous(), fn, eps)


def _no_norm(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    return x.flatten(1).float() @ fn.T


def _low_inputs(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    return _mixes(x.to(_LOW), fn.to(_LOW).float(), eps)


def _large_eps(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    return _mixes(x, fn, 10 * eps)


mutant("hc_pre", "one_round_more", "the column step after the softmax is not counted as a round")(_pre(comb_of=_one_more))
mutant("hc_pre", "rows_last", "rows and columns change places in the normalisation")(_pre(comb_of=_rows_last))
mutant("hc_pre", "softmax_only", "the matrix is a softmax and not normalised further")(
    _pre(comb_of=lambda logits, eps, iters: torch.softmax(logits, -1) + eps)
)
mutant("hc_pre", "rounds_bf16", "the normalisation runs in bf16")(_pre(comb_of=_low_rounds))
mutant("hc_pre", "comb_transposed", "rows of comb are read as its columns")(_pre(transpose=True))
mutant("hc_pre", "post_factor", "post is a sigmoid without the factor 2")(_pre(post_factor=1.0))
mutant("hc_pre", "scales_swapped", "pre and post change their scales")(_pre(order=(1, 0, 2)))
mutant("hc_pre", "base_lost", "the bias of the coefficients is not added")(_pre(with_base=False))
mutant("hc_pre", "pre_softmax", "pre is a softmax over the streams")(_pre(activation=lambda x: torch.softmax(x, -1)))
mutant("hc_pre", "norm_of_one_stream", "the norm is that of the first stream only")(_pre(mixes=_per_stream))
mutant("hc_pre", "stream_minor", "the streams are flattened channel after channel")(_pre(mixes=_stream_minor))
mutant("hc_pre", "norm_lost", "coefficients are not divided by the norm of the streams")(_pre(mixes=_no_norm))
mutant("hc_pre", "weights_bf16", "streams and fn are rounded to bf16 before the product")(_pre(mixes=_low_inputs))
mutant("hc_pre", "eps_times_10", "the norm's epsilon is ten times too large")(_pre(mixes=_large_eps))


def _post(make: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Any:
    """hc_post in fp32 from make(y [T, D], streams [T, n, D], post, comb)."""

    def body(call: Any, y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
        return make(y_TD.float(), streams_TnD.float(), post_Tn, comb_Tnn).to(y_TD.dtype).contiguous()

    return body


def _mixed(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return post[:, :, None] * y[:, None] + comb.transpose(1, 2) @ x


def _in_place(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    for k in range(x.shape[1]):
        x[:, k] = post[:, k, None] * y + (comb[:, :, k, None] * x).sum(1)
    return x


mutant("hc_post", "comb_transposed", "comb is contracted over its second index")(
    _post(lambda y, x, post, comb: post[:, :, None] * y[:, None] + comb @ x)
)
mutant("hc_post", "post_lost", "the sublayer's output is added with weight 1")(
    _post(lambda y, x, post, comb: _mixed(y, x, torch.ones_like(post), comb))
)
mutant("hc_post", "identity", "streams are kept instead of mixed")(
    _post(lambda y, x, post, comb: post[:, :, None] * y[:, None] + x)
)
mutant("hc_post", "last_stream_lost", "the last stream does not enter the mix")(
    _post(lambda y, x, post, comb: _mixed(y, torch.cat((x[:, :-1], x[:, -1:] * 0), 1), post, comb))
)
mutant("hc_post", "comb_bf16", "comb is rounded to bf16 before the mix")(
    _post(lambda y, x, post, comb: _mixed(y, x, post, comb.to(_LOW).float()))
)
mutant("hc_post", "mix_bf16", "the mixed streams are rounded to bf16 before the output is added", dtypes=(torch.float32,))(
    _post(lambda y, x, post, comb: post[:, :, None] * y[:, None] + (comb.transpose(1, 2) @ x).to(_LOW).float())
)
mutant("hc_post", "output_of_next_token", "each token gets the sublayer's output of the next one")(
    _post(lambda y, x, post, comb: _mixed(y.roll(-1, 0), x, post, comb))
)
mutant("hc_post", "post_of_next_stream", "each stream takes the weight of the next one")(
    _post(lambda y, x, post, comb: _mixed(y, x, post.roll(-1, 1), comb))
)
mutant("hc_post", "in_place", "streams that are written already enter the mix of those behind them")(
    _post(lambda y, x, post, comb: _in_place(y, x.clone(), post, comb))
)
mutant("hc_post", "post_of_first_stream", "all streams take the weight of the first")(
    _post(lambda y, x, post, comb: _mixed(y, x, post[:, :1].expand_as(post), comb))
)


def _head(
    *, mixes: Mix = _mixes, activation: Any = torch.sigmoid, use: tuple[bool, bool] = (True, True), low: bool = False
) -> Any:
    """hc_head in fp32 with one of its parts replaced; use: (scale, base)."""

    def body(
        call: Any, streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float
    ) -> Tensor:
        u = mixes(streams_TnD, fn, norm_eps)
        pre = activation(u * (scale if use[0] else 1.0) + (base if use[1] else 0.0)) + hc_eps
        pre = pre.to(_LOW).float() if low else pre
        return (pre[:, :, None] * streams_TnD.float()).sum(1).to(streams_TnD.dtype)

    return body


mutant("hc_head", "softmax", "weights are a softmax over the streams")(_head(activation=lambda x: torch.softmax(x, -1)))
mutant("hc_head", "mean", "the streams are averaged")(_head(activation=lambda x: torch.full_like(x, 1 / x.shape[1])))
mutant("hc_head", "factor_2", "weights carry the factor 2 of post")(_head(activation=lambda x: 2 * torch.sigmoid(x)))
mutant("hc_head", "scale_lost", "the scale is left away")(_head(use=(False, True)))
mutant("hc_head", "base_lost", "the bias is left away")(_head(use=(True, False)))
mutant("hc_head", "norm_lost", "coefficients are not divided by the norm of the streams")(_head(mixes=_no_norm))
mutant("hc_head", "stream_minor", "the streams are flattened channel after channel")(_head(mixes=_stream_minor))
mutant("hc_head", "weights_bf16", "the weights are rounded to bf16 before the sum")(_head(low=True))


def _reversed(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    f = x.flatten(1).float().flip(1)
    return (f @ fn.flip(1).T) / torch.sqrt(f.square().mean(-1, keepdim=True) + eps)


def _split(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    f, h = x.flatten(1).float(), fn.shape[1] // 2
    return (f[:, :h] @ fn[:, :h].T + f[:, h:] @ fn[:, h:].T) * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)


for _name, _what, _order in (
    ("reversed", "channels summed in the other order, division by the root", _reversed),
    ("split", "two halves of the channels by themselves, added", _split),
):
    legal("hc_pre", _name, _what)(_pre(mixes=_order))
    legal("hc_head", _name, _what)(_head(mixes=_order))
legal("hc_post", "streams_reversed", "streams summed in the other order, the output first")(
    _post(
        lambda y, x, post, comb: sum(
            (comb[:, j, :, None] * x[:, j, None] for j in reversed(range(x.shape[1]))), post[:, :, None] * y[:, None]
        )
    )
)
