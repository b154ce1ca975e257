"""Faults and legal variants of linear layers over stored weights: what becomes of codes and scales.

Shapes: x [T, K], weight [N, K] (FP4: [N, K/2]), scales as the contracts state them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ops.linear import _fp8_input
from ops.linear_dense import out_type
from ops.mutants.core import arguments, legal, mutant
from ops.quant import dequant_fp8_block, dequant_int8, dequant_mxfp4, e8m0_values
from ops.quant_fp4 import FP4_VALUES, fp4_values, unpack_fp4

STORED = ("linear_fp8", "linear_fp4", "linear_int8")
Arguments = dict[str, Any]


def _x(op: str, a: Arguments) -> Tensor:
    if op != "linear_int8":
        return _fp8_input(a["x"], a["x_scale"], torch.float32)
    return a["x"].float() if a["x_scale"] is None else a["x"].float() * a["x_scale"][:, None]


def _w(op: str, a: Arguments) -> Tensor:
    if op == "linear_fp8":
        return dequant_fp8_block.reference(a["weight_NK"], a["scale"], dtype=torch.float32)
    if op == "linear_fp4":
        return dequant_mxfp4.reference(a["weight"], a["scale"], dtype=torch.float32)
    return dequant_int8.reference(a["weight_NK"], a["scale"], dtype=torch.float32)


def operands(op: str, a: Arguments) -> tuple[Tensor, Tensor]:
    """x [T, K] and w [N, K] in fp32 of a call with arguments `a`."""
    return _x(op, a), _w(op, a)


def _changed(op: str, **changes: Callable[[Arguments], Any]) -> Any:
    """The correct op on changed arguments; without activation scales, changes of them do nothing."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(op, args, kwargs)
        return call(**{**a, **{n: change(a) for n, change in changes.items() if a[n] is not None}})

    return body


def _made(op: str, make: Callable[[Arguments], Tensor]) -> Any:
    """The op whose fp32 result is make(arguments)."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(op, args, kwargs)
        return make(a).to(out_type(a["x"], a["out_dtype"]))

    return body


def _bytes(change: Callable[[Tensor], Tensor], name: str = "scale") -> Callable[[Arguments], Tensor]:
    """A change of E8M0 scales as bytes."""
    return lambda a: change(a[name].view(torch.uint8)).contiguous().view(torch.float8_e8m0fnu)


def _by_columns(s: Tensor) -> Tensor:
    return s.T.reshape(s.shape)


_SCALES: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("scale_of_next_inputs", "each block takes the scale of the next block of K", lambda s: s.roll(-1, 1)),
    ("scale_of_next_outputs", "each block takes the scale of the next rows", lambda s: s.roll(-1, 0)),
    ("scale_by_columns", "scales are read column by column", _by_columns),
    ("scale_of_first_block", "one scale for a whole row: that of its first block", lambda s: s[:, :1].expand_as(s)),
    ("exponent_bias_126", "the exponent of a scale is one too large", lambda s: s + 1),
    ("scale_inverted", "weights are divided by their scale", lambda s: 254 - s),
)
for _op in ("linear_fp8", "linear_fp4"):
    for _name, _what, _change in _SCALES:
        mutant(_op, _name, _what)(_changed(_op, scale=_bytes(_change)))
    mutant(_op, "x_scale_lost", "activation codes are not scaled")(
        _changed(_op, x_scale=_bytes(lambda s: s * 0 + 127, "x_scale"))
    )
    mutant(_op, "x_scale_of_next_token", "each token takes the activation scales of the next one")(
        _changed(_op, x_scale=_bytes(lambda s: s.roll(-1, 0), "x_scale"))
    )
    mutant(_op, "x_scale_of_next_group", "each group of activations takes the scale of the next one")(
        _changed(_op, x_scale=_bytes(lambda s: s.roll(-1, 1), "x_scale"))
    )
    mutant(_op, "x_scale_of_first_group", "a token has one activation scale: that of its first group")(
        _changed(_op, x_scale=_bytes(lambda s: s[:, :1].expand_as(s), "x_scale"))
    )
    mutant(_op, "out_dtype_lost", "codes give bf16, whatever type is asked for", dtypes=(torch.float32,))(
        _changed(_op, out_dtype=lambda a: None)
    )


def _spread(values: Tensor, n: int, k: int) -> Tensor:
    return values.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]


def _blocks_bf16(a: Arguments) -> Tensor:
    x, w = operands("linear_fp8", a)
    parts = zip(x.split(128, 1), w.split(128, 1), strict=True)
    return sum(((p @ q.T).bfloat16().float() for p, q in parts), torch.zeros(x.shape[0], w.shape[0]))


def _bytes_as_numbers(a: Arguments) -> Tensor:
    return _x("linear_fp8", a) @ (a["weight_NK"].float() * _spread(a["scale"].view(torch.uint8).float(), *a["weight_NK"].shape)).T


def _fnuz(a: Arguments) -> Tensor:
    codes = a["weight_NK"].view(torch.uint8).view(torch.float8_e4m3fnuz).float().nan_to_num()
    return _x("linear_fp8", a) @ (codes * _spread(e8m0_values(a["scale"]), *a["weight_NK"].shape)).T


mutant("linear_fp8", "block_sums_bf16", "the sum of each 128 products is rounded to bf16")(_made("linear_fp8", _blocks_bf16))
mutant("linear_fp8", "scale_bytes_as_numbers", "the byte of a scale is read as a number")(_made("linear_fp8", _bytes_as_numbers))
mutant("linear_fp8", "codes_fnuz", "weight codes are read in the other FP8 format, with exponent bias 8")(
    _made("linear_fp8", _fnuz)
)
mutant("linear_fp8", "block_of_64", "scale blocks are taken to be 64 rows high")(
    _made(
        "linear_fp8",
        lambda a: _x("linear_fp8", a)
        @ (
            a["weight_NK"].float()
            * e8m0_values(a["scale"])[(torch.arange(a["weight_NK"].shape[0]) // 64).clamp(max=len(a["scale"]) - 1)]
            .repeat_interleave(128, 1)[:, : a["weight_NK"].shape[1]]
        ).T,
    )
)  # fmt: skip

# ---- FP4 codes ------------------------------------------------------------------------------------------------------

mutant("linear_fp4", "nibbles_swapped", "the high nibble is taken for the first channel")(
    _changed("linear_fp4", weight=lambda a: (a["weight"] >> 4) | (a["weight"] << 4))
)
mutant("linear_fp4", "nibbles_apart", "low nibbles are taken for the first half of a group, high ones for the second")(
    _made("linear_fp4", lambda a: _fp4_product(a, lambda c: torch.cat((c[..., 0::2], c[..., 1::2]), -1)))
)


def _fp4_product(
    a: Arguments, order: Callable[[Tensor], Tensor] = lambda c: c, table: Callable[[Tensor], Tensor] = fp4_values
) -> Tensor:
    codes = unpack_fp4(a["weight"]).unflatten(-1, (-1, 32))
    w = (table(order(codes)) * e8m0_values(a["scale"])[..., None]).flatten(-2)
    return _x("linear_fp4", a) @ w.T


def _table(*numbers: float) -> Callable[[Tensor], Tensor]:
    return lambda codes: torch.tensor(numbers)[codes.long()]


_NEGATIVE = tuple(-v for v in FP4_VALUES)
for _name, _what, _numbers in (
    ("sign_lost", "the sign of FP4 codes is lost", (*FP4_VALUES, *FP4_VALUES)),
    ("table_ends_in_8", "the largest FP4 value is 8 instead of 6", (*FP4_VALUES[:-1], 8.0, *_NEGATIVE[:-1], -8.0)),
    ("half_flushed", "the subnormal FP4 value 0.5 is taken for zero", (0.0, 0.0, *FP4_VALUES[2:], 0.0, 0.0, *_NEGATIVE[2:])),
    ("codes_int4", "FP4 codes are read as integers in two's complement", (*map(float, range(8)), *map(float, range(-8, 0)))),
):
    mutant("linear_fp4", _name, _what)(_made("linear_fp4", partial(_fp4_product, table=_table(*_numbers))))


@mutant("linear_fp4", "x_scale_by_32", "activation scales are looked up per 32 channels, as those of the weight")
def _by_32(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments("linear_fp4", args, kwargs)
    if a["x_scale"] is None:
        return call(**a)
    group = (torch.arange(a["x"].shape[1]) // 32) % a["x_scale"].shape[1]
    x = a["x"].float() * e8m0_values(a["x_scale"])[:, group]
    return (x @ _w("linear_fp4", a).T).to(out_type(a["x"], a["out_dtype"]))


# ---- INT8 -----------------------------------------------------------------------------------------------------------

_OP8 = "linear_int8"


def _integer(a: Arguments, store: Callable[[Tensor], Tensor]) -> Tensor:
    """Integer sums passed through `store`, then scaled; float activations as in the correct op."""
    if a["x_scale"] is None:
        return _x(_OP8, a) @ _w(_OP8, a).T
    sums = store(a["x"].double() @ a["weight_NK"].double().T)
    return (sums * a["x_scale"].double()[:, None] * a["scale"].double()).float()


def _wrap_16(sums: Tensor) -> Tensor:
    return ((sums.long() + 32768) % 65536 - 32768).double()


def _unsigned(t: Tensor) -> Tensor:
    return t.view(torch.uint8).float()


mutant(_OP8, "sums_int16", "sums wrap round at 16 bits")(_made(_OP8, lambda a: _integer(a, _wrap_16)))
mutant(_OP8, "sums_saturate", "sums are clamped to 16 bits")(_made(_OP8, lambda a: _integer(a, lambda s: s.clamp(-32768, 32767))))
mutant(_OP8, "sums_bf16", "integer sums are stored in bf16 before they are scaled")(
    _made(_OP8, lambda a: _integer(a, lambda s: s.bfloat16().double()))
)
mutant(_OP8, "weight_unsigned", "weight codes are read as unsigned")(
    _made(_OP8, lambda a: _x(_OP8, a) @ (_unsigned(a["weight_NK"]) * a["scale"][:, None]).T)
)
mutant(_OP8, "zero_point", "weight codes are taken to be centred on -0.5")(
    _made(_OP8, lambda a: _x(_OP8, a) @ ((a["weight_NK"].float() + 0.5) * a["scale"][:, None]).T)
)
mutant(_OP8, "minus_127_clamped", "codes saturate at 126")(_changed(_OP8, weight_NK=lambda a: a["weight_NK"].clamp(-126, 126)))
mutant(_OP8, "scale_of_next_channel", "each output takes the scale of the next one")(
    _changed(_OP8, scale=lambda a: a["scale"].roll(-1))
)
mutant(_OP8, "scale_of_first_channel", "one scale for the whole weight")(
    _changed(_OP8, scale=lambda a: a["scale"][:1].expand_as(a["scale"]).contiguous())
)
mutant(_OP8, "scale_bf16", "weight scales are kept in bf16")(_changed(_OP8, scale=lambda a: a["scale"].bfloat16().float()))
mutant(_OP8, "x_scale_bf16", "activation scales are kept in bf16")(
    _changed(_OP8, x_scale=lambda a: a["x_scale"].bfloat16().float())
)
mutant(_OP8, "divided_by_128", "scales are amax / 128 where the codes were made for amax / 127")(
    _changed(_OP8, scale=lambda a: a["scale"] * 127 / 128)
)
mutant(_OP8, "x_scale_lost", "activation codes are not scaled")(_changed(_OP8, x_scale=lambda a: torch.ones_like(a["x_scale"])))
mutant(_OP8, "x_scale_of_next_token", "each token takes the activation scale of the next one")(
    _changed(_OP8, x_scale=lambda a: a["x_scale"].roll(-1))
)

# ---- legal ----------------------------------------------------------------------------------------------------------


def _scaled_sums_fp8(a: Arguments) -> Tensor:
    x = a["x"].float()
    n, k = a["weight_NK"].shape
    scale_w = e8m0_values(a["scale"]).repeat_interleave(128, 0)[:n]
    scale_x = torch.ones(len(x), scale_w.shape[1]) if a["x_scale"] is None else e8m0_values(a["x_scale"])
    acc = torch.zeros(len(x), n)
    for b in range(scale_w.shape[1]):
        part = slice(128 * b, min(128 * b + 128, k))
        acc += x[:, part] @ a["weight_NK"][:, part].float().T * (scale_x[:, b : b + 1] * scale_w[:, b])
    return acc


def _scaled_sums_fp4(a: Arguments) -> Tensor:
    x = _x("linear_fp4", a)
    codes = fp4_values(unpack_fp4(a["weight"]))
    parts = zip(x.split(32, 1), codes.split(32, 1), e8m0_values(a["scale"]).T, strict=True)
    return sum((p @ q.T * s for p, q, s in parts), torch.zeros(len(x), len(codes)))


def _scaled_sums_int8(a: Arguments) -> Tensor:
    sums = (a["x"].double() @ a["weight_NK"].double().T).float()
    return sums * a["scale"] if a["x_scale"] is None else sums * (a["x_scale"][:, None] * a["scale"])


for _op, _sums in (("linear_fp8", _scaled_sums_fp8), ("linear_fp4", _scaled_sums_fp4), (_OP8, _scaled_sums_int8)):
    legal(_op, "scaled_sums", "codes are multiplied and summed first, each block's sum is scaled")(_made(_op, _sums))
