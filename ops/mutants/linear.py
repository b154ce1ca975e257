"""Faults and legal variants of the linear layers, plain, grouped and over stored weights.

Shapes: x [T, K], w [N, K]; grouped: x [T, G, K], w [G, N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.linear_dense import out_type
from ops.mutants.core import arguments, legal, mutant
from ops.mutants.linear_stored import STORED, operands

Product = Callable[[Tensor, Tensor], Tensor]
_LOW, _FULL = (torch.bfloat16,), (torch.float32,)


def _plain(product: Product) -> Any:
    def body(call: Any, x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        y = product(x.float().flatten(0, -2), weight_NK.float())
        return y.view(*x.shape[:-1], -1).to(out_type(x, out_dtype)) if y.numel() else call(x, weight_NK, out_dtype=out_dtype)

    return body


def _grouped(product: Product) -> Any:
    def body(call: Any, x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
        x, w = x_TGK.float(), weight_GNK.float()
        return torch.stack([product(x[:, g], w[g]) for g in range(len(w))], 1).to(x_TGK.dtype)

    return body


def _stored(op: str, product: Product) -> Any:
    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(op, args, kwargs)
        return product(*operands(op, a)).to(out_type(a["x"], a["out_dtype"]))

    return body


def _everywhere(register: Any, name: str, what: str, product: Product, **kwargs: Any) -> None:
    register("linear", name, what, **kwargs)(_plain(product))
    register("grouped_linear", name, what, **kwargs)(_grouped(product))
    for op in STORED:
        register(op, name, what, **kwargs)(_stored(op, product))


def _running(step: int, store: Callable[[Tensor], Tensor]) -> Product:
    """The sum over K in steps, the accumulator stored by `store` after each."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        acc = torch.zeros(x.shape[0], w.shape[0])
        for k in range(0, x.shape[1], step):
            acc = store(acc + x[:, k : k + step] @ w[:, k : k + step].T)
        return acc

    return product


def _bits(count: int) -> Callable[[Tensor], Tensor]:
    """fp32 cut off to `count` bits behind the leading one."""
    mask = -(1 << (23 - count))
    return lambda t: (t.contiguous().view(torch.int32) & mask).view(torch.float32)


def _tf32(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


def _bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def _whole_tiles(x: Tensor, w: Tensor) -> Tensor:
    k = x.shape[1] // 32 * 32 if x.shape[1] % 32 else x.shape[1] // 128 * 128
    return x[:, :k] @ w[:, :k].T if k else x @ w.T


def _without_last(x: Tensor, w: Tensor) -> Tensor:
    k = (x.shape[1] - 1) // 32 * 32
    return x[:, :k] @ w[:, :k].T


def _overlapping(x: Tensor, w: Tensor) -> Tensor:
    h = x.shape[1] // 2
    return x[:, : h + 1] @ w[:, : h + 1].T + x[:, h:] @ w[:, h:].T


def _second_half(x: Tensor, w: Tensor) -> Tensor:
    h = x.shape[1] // 2
    return x[:, h:] @ w[:, h:].T


def _partials_bf16(x: Tensor, w: Tensor) -> Tensor:
    return sum((_bf16(a @ b.T) for a, b in zip(x.tensor_split(4, 1), w.tensor_split(4, 1), strict=True)), torch.zeros(()))


def _rows_exchanged(x: Tensor, w: Tensor) -> Tensor:
    n = torch.arange(w.shape[0])
    return x @ w[(n ^ 1).clamp(max=w.shape[0] - 1)].T


_everywhere(mutant, "accumulator_bf16", "the sum is kept in bf16 from tile to tile of 32", _running(32, _bf16))
_everywhere(
    mutant, "accumulator_13_bits", "tiles are added in 13 bits and cut off, as FP8 tensor cores do", _running(32, _bits(13))
)
_everywhere(mutant, "accumulator_fp16", "the sum is kept in fp16", _running(32, lambda t: t.half().float()))
_everywhere(mutant, "partials_bf16", "four parts of K are stored in bf16 before they are added", _partials_bf16)
_everywhere(mutant, "tail_of_k_lost", "what is left of K behind whole tiles is not multiplied", _whole_tiles)
_everywhere(mutant, "last_tile_lost", "the loop over K stops one tile early", _without_last)
_everywhere(mutant, "split_overlaps", "the two halves of K share one channel", _overlapping)
_everywhere(mutant, "split_overwrites", "the second half of K overwrites the first instead of adding to it", _second_half)
_everywhere(mutant, "columns_exchanged", "neighbouring outputs change places", _rows_exchanged)
_everywhere(mutant, "tf32", "products are computed in TF32", lambda x, w: _tf32(x) @ _tf32(w).T, dtypes=_FULL)
_everywhere(mutant, "operands_bf16", "operands are rounded to bf16 first", lambda x, w: _bf16(x) @ _bf16(w).T, dtypes=_FULL)


@mutant("linear", "out_dtype_late", "the result is rounded to x's type before it takes the type asked for", dtypes=_LOW)
def _late(call: Any, x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    return call(x, weight_NK).to(out_type(x, out_dtype))


@mutant("linear", "out_dtype_lost", "the result has x's type, whatever is asked for", dtypes=_LOW)
def _lost(call: Any, x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    return call(x, weight_NK)


@mutant("linear", "weight_as_x", "a wider weight is rounded to x's type", dtypes=_LOW)
def _weight_as_x(call: Any, x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    return call(x, weight_NK.to(x.dtype), out_dtype=out_dtype)


# ---- grouped_linear -------------------------------------------------------------------------------------------------


def _groups(make: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """grouped_linear from make(x [T, G, K], w [G, N, K]) -> [T, G, N] in fp32."""

    def body(call: Any, x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
        return make(x_TGK.float(), weight_GNK.float()).to(x_TGK.dtype).contiguous()

    return body


def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("tgk,gnk->tgn", x, w)


def _strided(x: Tensor, w: Tensor) -> Tensor:
    return x.flatten(1).unflatten(1, (x.shape[2], x.shape[1])).transpose(1, 2)


mutant("grouped_linear", "next_group", "each group takes the weight of the next one")(
    _groups(lambda x, w: _product(x, w.roll(-1, 0)))
)
mutant("grouped_linear", "first_group", "all groups take the weight of the first one")(
    _groups(lambda x, w: _product(x, w[:1].expand_as(w)))
)
mutant("grouped_linear", "all_groups", "the inputs of all groups are summed into each")(
    _groups(lambda x, w: _product(x.sum(1, keepdim=True).expand_as(x), w))
)
mutant("grouped_linear", "groups_strided", "the channels of a group lie apart instead of together")(
    _groups(lambda x, w: _product(_strided(x, w), w))
)
mutant("grouped_linear", "groups_inner", "results lie group by group for each channel instead of channel by channel")(
    _groups(lambda x, w: _product(x, w).transpose(1, 2).reshape(x.shape[0], *w.shape[:2]))
)
mutant("grouped_linear", "group_of_token", "the group counts on over the tokens")(
    _groups(
        lambda x, w: torch.stack([_product(x[t : t + 1], w.roll(-t, 0))[0] for t in range(len(x))]) if len(x) else _product(x, w)
    )
)

# ---- legal ----------------------------------------------------------------------------------------------------------


def _split(x: Tensor, w: Tensor) -> Tensor:
    return sum((a @ b.T for a, b in zip(x.tensor_split(3, 1), w.tensor_split(3, 1), strict=True)), torch.zeros(()))


def _tree(x: Tensor, w: Tensor) -> Tensor:
    """64 parts of K by themselves, added in pairs of pairs."""
    pad = (0, -x.shape[1] % 64)
    parts = [torch.nn.functional.pad(t, pad).unflatten(1, (64, -1)).transpose(0, 1) for t in (x, w)]
    sums = parts[0] @ parts[1].mT
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


def _lanes(x: Tensor, w: Tensor) -> Tensor:
    return sum((x[:, i::8] @ w[:, i::8].T for i in range(8)), torch.zeros(()))


_everywhere(legal, "channels_reversed", "products summed in the other order", lambda x, w: x.flip(1) @ w.flip(1).T)
_everywhere(legal, "split_k", "three parts of K by themselves, added in fp32", _split)
_everywhere(legal, "tiles", "tiles of 16 channels added one after the other in fp32", _running(16, lambda t: t))
_everywhere(legal, "tree", "64 parts of K by themselves, added in pairs of pairs", _tree)
_everywhere(legal, "lanes", "eight interleaved sums, added at the end", _lanes)
_everywhere(legal, "fp64", "summed in float64 and rounded once", lambda x, w: x.double() @ w.double().T)
