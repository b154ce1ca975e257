"""Faults and legal variants of the ops that run all experts of a layer, of MXFP8 products and of the normed and rotated row.

Shapes: x [T, D], ids and weights [T, K], codes [T, K] with scales [T, K/32].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.contract import CONTRACTS
from ops.mutants.core import arguments, legal, mutant, rounded_reference

_E8M0 = torch.float8_e8m0fnu


def _changed(op: str, **changes: Callable[[dict[str, Any]], Any]) -> Any:
    """The correct op on changed arguments."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(op, args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


def _bytes(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda s: change(s.view(torch.uint8)).contiguous().view(_E8M0)


def _halves_swapped(w: Tensor) -> Tensor:
    return torch.cat(w.chunk(2, -2)[::-1], -2).contiguous()


def _centred(x: Tensor) -> Tensor:
    return (x.float() - x.float().mean(-1, keepdim=True)).to(x.dtype)


def _in_float64(op: str) -> Any:
    return lambda call, *args, **kwargs: rounded_reference(CONTRACTS[op], torch.float64)(*args, **kwargs)


for _op in ("moe_int8", "moe_mx", "linear_mx", "norm_rope", "rms_norm_quant"):
    legal(_op, "in_float64", "everything between quantisations is in float64")(_in_float64(_op))

for _op in ("moe_int8", "moe_mx"):
    mutant(_op, "experts_shifted", "tokens go to the expert behind the chosen one")(
        _changed(_op, ids_TK=lambda a: ((a["ids_TK"] + 1) % a["w13"].shape[0]).to(torch.int32))
    )
    mutant(_op, "weights_not_used", "every chosen expert counts the same")(_changed(_op, weights_TK=lambda a: torch.ones_like(a["weights_TK"])))
    mutant(_op, "weights_bf16", "routing weights pass through bf16", dtypes=(torch.float32,))(
        _changed(_op, weights_TK=lambda a: a["weights_TK"].bfloat16().float())
    )
    mutant(_op, "last_choice_lost", "the last chosen expert is left out")(
        _changed(_op, weights_TK=lambda a: torch.cat((a["weights_TK"][:, :-1], torch.zeros_like(a["weights_TK"][:, -1:])), 1))
    )
    mutant(_op, "routed_left_out", "only the shared expert counts")(_changed(_op, weights_TK=lambda a: torch.zeros_like(a["weights_TK"])))
    mutant(_op, "limit_lost", "gate and up are not clamped")(_changed(_op, limit=lambda a: 1e30))
    mutant(_op, "gate_and_up_swapped", "the halves of the shared w13 are taken the other way round")(
        _changed(_op, shared_w13=lambda a: _halves_swapped(a["shared_w13"].view(torch.uint8)).view(a["shared_w13"].dtype))
    )

mutant("moe_int8", "shared_left_out", "the shared expert is left out")(_changed("moe_int8", shared_s2=lambda a: torch.zeros_like(a["shared_s2"])))
mutant("moe_int8", "shared_scale_of_next_channel", "channels of the shared w2 take the scale of the next one")(
    _changed("moe_int8", shared_s2=lambda a: a["shared_s2"].roll(-1))
)
mutant("moe_mx", "shared_scale_doubled", "scales of the shared w13 are one power of two too large")(
    _changed("moe_mx", shared_s13=lambda a: _bytes(lambda b: b + 1)(a["shared_s13"]))
)
mutant("moe_mx", "scales_of_next_group", "groups of w13 take the scale of the next group")(
    _changed("moe_mx", s13=lambda a: _bytes(lambda b: b.roll(1, -2))(a["s13"]))
)

mutant("linear_mx", "scale_per_128", "the first group of four gives the scale of all of them")(
    _changed("linear_mx", x_scale=lambda a: _bytes(lambda b: b[:, torch.arange(b.shape[1]) // 4 * 4])(a["x_scale"]))
)
mutant("linear_mx", "scale_of_next_token", "tokens take the scale of the next one")(
    _changed("linear_mx", x_scale=lambda a: _bytes(lambda b: b.roll(1, 0))(a["x_scale"]))
)
mutant("linear_mx", "weight_scale_ignored", "the weight's scales are taken as 1")(
    _changed("linear_mx", scale=lambda a: _bytes(lambda b: torch.full_like(b, 127))(a["scale"]))
)
mutant("linear_mx", "exponent_off_by_one", "the bias of the exponent is 128")(
    _changed("linear_mx", x_scale=lambda a: _bytes(lambda b: b - 1)(a["x_scale"]))
)


mutant("linear_mx", "weight_scale_doubled", "the weight's scales are one power of two too large")(
    _changed("linear_mx", scale=lambda a: _bytes(lambda b: b + 1)(a["scale"]))
)
mutant("linear_mx", "scale_ignored", "the scales of x are taken as 1")(
    _changed("linear_mx", x_scale=lambda a: _bytes(lambda b: torch.full_like(b, 127))(a["x_scale"]))
)
mutant("linear_mx", "signs_lost", "codes of x are read without their sign")(_changed("linear_mx", x=lambda a: a["x"].float().abs().to(a["x"].dtype)))
mutant("linear_mx", "last_group_lost", "the last 32 channels are left out")(
    _changed("linear_mx", x=lambda a: torch.cat((a["x"].float()[:, :-32], torch.zeros_like(a["x"].float()[:, -32:])), 1).to(a["x"].dtype))
)


@mutant("linear_mx", "bf16_sum", "the sum is rounded to bf16 first", dtypes=(torch.float32,))
def _bf16_sum(call: Any, x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    y: Tensor = call(x, weight_NK, scale, x_scale=x_scale, out_dtype=out_dtype)
    return y.bfloat16().to(out_dtype)


mutant("norm_rope", "weight_left_out", "the weight is taken as ones")(_changed("norm_rope", weight=lambda a: torch.ones_like(a["weight"])))
mutant("norm_rope", "inverse", "the rotation turns the other way")(_changed("norm_rope", sin_TR2=lambda a: -a["sin_TR2"]))
mutant("norm_rope", "not_rotated", "nothing is rotated")(
    _changed("norm_rope", cos_TR2=lambda a: torch.ones_like(a["cos_TR2"]), sin_TR2=lambda a: torch.zeros_like(a["sin_TR2"]))
)
mutant("norm_rope", "one_added", "the weight is one more than it is stored")(_changed("norm_rope", weight=lambda a: a["weight"] + 1))
mutant("norm_rope", "mean_subtracted", "a layer norm: the mean is taken off first")(_changed("norm_rope", x=lambda a: _centred(a["x"])))
mutant("norm_rope", "position_of_next_row", "rows are turned by the angles of the next one")(
    _changed("norm_rope", cos_TR2=lambda a: a["cos_TR2"].roll(-1, 0), sin_TR2=lambda a: a["sin_TR2"].roll(-1, 0))
)
mutant("norm_rope", "amplitude_of_yarn", "cosines and sines carry an amplitude")(
    _changed("norm_rope", cos_TR2=lambda a: a["cos_TR2"] * 1.2773, sin_TR2=lambda a: a["sin_TR2"] * 1.2773)
)
mutant("norm_rope", "epsilon_of_another_model", "epsilon is 1e-2")(_changed("norm_rope", eps=lambda a: 1e-2))


@mutant("norm_rope", "norm_behind", "the row is normed behind the rotation, so that the weight meets the turned channels")
def _norm_behind(call: Any, x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    one, none = torch.ones_like(cos_TR2), torch.zeros_like(sin_TR2)
    turned: Tensor = call(x, torch.ones_like(weight), cos_TR2, sin_TR2, eps=eps)
    scaled: Tensor = turned * weight
    return scaled if cos_TR2.shape[1] else call(x, weight, one, none, eps=eps)


@legal("norm_rope", "rounded_between", "the normed row is rounded to its type before it is turned", dtypes=(torch.bfloat16,))
def _rounded_between(call: Any, x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    one, none = torch.ones_like(cos_TR2), torch.zeros_like(sin_TR2)
    normed: Tensor = call(x, weight, one, none, eps=eps)
    y, c, s = normed.float(), cos_TR2, sin_TR2
    plain = x.shape[-1] - 2 * c.shape[1]
    a, b = y[:, plain::2].clone(), y[:, plain + 1 :: 2].clone()
    y[:, plain::2], y[:, plain + 1 :: 2] = a * c - b * s, a * s + b * c
    return y.to(x.dtype)


def _after(change: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]) -> Any:
    """rms_norm_quant with its codes and scales changed."""

    def body(call: Any, x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> tuple[Tensor, Tensor]:
        codes, scale = call(x_TK, weight_K, eps=eps, kind=kind)
        changed, other = change(codes, scale, kind)
        return changed.to(codes.dtype).contiguous(), other.contiguous()

    return body


def _one_down(codes: Tensor) -> Tensor:
    return codes - codes.sign() if codes.dtype == torch.int8 else (codes.view(torch.uint8) - 1).view(codes.dtype)


_NQ = "rms_norm_quant"
mutant(_NQ, "weight_left_out", "the weight is taken as ones")(_changed(_NQ, weight_K=lambda a: torch.ones_like(a["weight_K"])))
mutant(_NQ, "epsilon_of_another_model", "epsilon is 1e-2")(_changed(_NQ, eps=lambda a: 1e-2))
mutant(_NQ, "codes_one_down", "codes are one step nearer to zero")(
    _after(lambda c, s, k: (torch.where(c.float() != 0, _one_down(c).float(), c.float()), s))
)
mutant(_NQ, "scale_of_next_row", "rows take the scale of the next one")(
    _after(lambda c, s, k: (c, s.roll(1, 0) if k == "int8" else s.view(torch.uint8).roll(1, 0).view(_E8M0)))
)
mutant(_NQ, "scale_doubled", "scales are twice as large")(
    _after(lambda c, s, k: (c, s * 2 if k == "int8" else (s.view(torch.uint8) + 1).view(_E8M0)))
)
mutant(_NQ, "scale_halved", "scales are half as large")(
    _after(lambda c, s, k: (c, s / 2 if k == "int8" else (s.view(torch.uint8) - 1).view(_E8M0)))
)
mutant(_NQ, "codes_of_next_row", "rows take the codes of the next one")(_after(lambda c, s, k: (c.view(torch.uint8).roll(1, 0).view(c.dtype).float(), s)))
mutant(_NQ, "signs_lost", "codes have lost their sign")(_after(lambda c, s, k: (c.float().abs(), s)))
mutant(_NQ, "one_added", "the weight is one more than it is stored")(_changed(_NQ, weight_K=lambda a: a["weight_K"] + 1))
mutant(_NQ, "mean_subtracted", "a layer norm: the mean is taken off first")(_changed(_NQ, x_TK=lambda a: _centred(a["x_TK"])))
