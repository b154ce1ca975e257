"""Faults and legal variants of grouped experts with INT8 weights and activations.

Shapes: rows [A, D] sorted by expert, gate and up [A, I], row_weight [A], counts [E], w13 [E, 2I, D], w2 [E, D, I].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.experts_int8 import _int8, roundtrip_rows
from ops.experts_math import Weight
from ops.mutants.core import arguments, legal, mutant
from ops.mutants.experts import _ACTIVATIONS, _ALLOWED, _FAULTS, Recipe, _bf16, _hidden, _interleaved, _same
from ops.quant import dequant_fp8, quant_fp8

_OP = "grouped_experts_int8"
Change = Callable[[Tensor], Tensor]


def _trip(x: Tensor) -> Tensor:
    return roundtrip_rows(x, torch.float32)


def _truncated(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / torch.where(scale > 0, scale, torch.ones_like(scale))).trunc() * scale


def _scale_of_all_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax().clamp_min(1e-30) / 127 if x.numel() else x.new_ones(())
    return (x / scale).round() * scale


def _fp8(x: Tensor) -> Tensor:
    return dequant_fp8.reference(*quant_fp8.reference(x), dtype=torch.float32)


def _recipe(s13: Change = _same, s2: Change = _same, **parts: Any) -> Callable[..., Tensor]:
    made = Recipe(**{"x": _trip, "h": _trip, **parts})

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(_OP, args, kwargs)
        first: Weight = _int8(a["w13"], s13(a["s13"].float()))
        second: Weight = _int8(a["w2"], s2(a["s2"].float()))
        return made.run(a, a["rows_AD"], a["row_weight_A"], a["counts_E"], first, second).to(a["rows_AD"].dtype)

    return body


for _name, _what, _part in _ACTIVATIONS:
    mutant(_OP, _name, _what)(_recipe(hidden=_part))
for _name, _what, _parts in _FAULTS:
    mutant(_OP, _name, _what)(_recipe(**_parts))
mutant(_OP, "interleaved", "gate and up are taken to alternate")(_recipe(halves=_interleaved))
mutant(_OP, "rows_not_quantised", "rows are not rounded to INT8")(_recipe(x=_same))
mutant(_OP, "activation_not_quantised", "the activation is not rounded to INT8")(_recipe(h=_same))
mutant(_OP, "rows_fp8", "rows are rounded to FP8 instead")(_recipe(x=_fp8))
mutant(_OP, "rows_truncated", "codes of rows are truncated instead of rounded")(_recipe(x=_truncated))
mutant(_OP, "activation_truncated", "codes of the activation are truncated instead of rounded")(_recipe(h=_truncated))
mutant(_OP, "rows_one_scale", "all rows share one scale")(_recipe(x=_scale_of_all_rows))
mutant(_OP, "always_quantised", "activations are rounded even where none is asked for")(_recipe(x_plain=_trip, h_plain=_trip))
mutant(_OP, "first_scale_next_channel", "each channel of w13 takes the scale of the next one")(_recipe(s13=lambda s: s.roll(-1, 1)))
mutant(_OP, "second_scale_next_channel", "each channel of w2 takes the scale of the next one")(_recipe(s2=lambda s: s.roll(-1, 1)))
mutant(_OP, "first_scale_of_expert", "w13 has one scale per expert")(_recipe(s13=lambda s: s.mean(1, keepdim=True).expand_as(s)))

for _name, _what, _parts in _ALLOWED:
    legal(_OP, _name, _what)(_recipe(**_parts))
legal(_OP, "stored", "gate, up and the activation are stored in bf16", dtypes=(torch.bfloat16,))(
    _recipe(hidden=lambda g, u, m, w: _bf16(_hidden(_bf16(g), _bf16(u), m, w)))
)
legal(_OP, "weight_behind", "the routing weight is applied behind the second product: the codes do not depend on it")(
    _recipe(hidden=lambda g, u, m, w: _hidden(g, u, m, w * 0 + 1), after=lambda y, w: y * w)
)
