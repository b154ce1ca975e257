"""How far logits may move when every op stays inside its own error bound: the contracts' bounds, propagated by running the model.

A model is run with every floating op output moved up or down by its full bound, signs at random, while choices (experts,
index sets) are kept as they were. The largest change of a logit over a few such runs is what rounding inside the bounds can
do; two correct runs may each lie that far from the exact result, hence the factor 2. The bounds are about four standard
deviations of the roundings, so an honest difference stays far below, and a wrong row, position or mask far above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import v4
from ops.bounds import roundoff
from ops.contract import CONTRACTS
from ops.registry import signature


@contextmanager
def replaced(ops: SimpleNamespace, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Every bound op of a model replaced by `wrap(name, function)` while the context lasts."""
    originals = dict(vars(ops))
    vars(ops).update({name: wrap(name, fn) for name, fn in originals.items()})
    try:
        yield
    finally:
        vars(ops).update(originals)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


class _Noise:
    def __init__(self, seed: int, choices: list[Any] | None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.recorded: list[Any] = []
        self.replay = iter(choices) if choices is not None else None

    def wrap(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        contract = CONTRACTS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.replay is None:
                result = fn(*args, **kwargs)
                if contract.choices:
                    self.recorded.append(result)
                return result
            if contract.choices:
                fn(*args, **kwargs)
                return next(self.replay)
            before = signature(contract).bind(*args, **kwargs)
            for key in contract.mutates:
                before.arguments[key] = before.arguments[key].clone()
            result = fn(*args, **kwargs)
            after = signature(contract).bind(*args, **kwargs).arguments
            outputs = _flat(result)
            found = (*outputs, *(after[key] for key in contract.mutates))
            golden = tuple(t.double() if t.is_floating_point() else t for t in found)
            allowed = contract.bound(*before.args, **before.kwargs, golden=golden, found=found)
            for y, b in zip(outputs, allowed, strict=False):
                if y.is_floating_point() and b is not None and not callable(b):
                    reach = roundoff(y.dtype) * y.double().abs() + torch.as_tensor(b, dtype=torch.float64)
                    sign = torch.randint(0, 2, y.shape, generator=self.generator) * 2 - 1
                    y.copy_((y.double() + sign * reach).to(y.dtype))
            return result

        return call


def logit_tolerance(model: v4.LoadedModel, ids: Sequence[int], draws: int = 3) -> float:
    """Allowed difference of two correct runs in units of the largest logit, for this model on these tokens."""
    ops = model.binding.ops
    plain = _Noise(0, None)
    with replaced(ops, plain.wrap):
        golden = model.logits(ids)
    worst = 0.0
    for seed in range(draws):
        noise = _Noise(seed, plain.recorded)
        with replaced(ops, noise.wrap):
            worst = max(worst, float((model.logits(ids) - golden).abs().max()))
    return 2 * worst / float(golden.abs().max())
