"""Judging one call of an implementation against the contract's float64 golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.bounds import roundoff
from ops.contract import Contract, Sample
from ops.error_statistics import excess, gain, lean
from ops.registry import signature


@dataclass(frozen=True)
class Verdict:
    """Outcome of one judged call. `worst` is the largest error divided by its allowance over all outputs."""

    op: str
    sample: str
    ok: bool
    worst: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.op}[{self.sample}]: " + ("ok" if self.ok else "WRONG")
        return "\n  ".join([f"{head}, worst error/bound {self.worst:.3g}", *self.problems])


GUARD = 256
UNTYPICAL = frozenset({"constant", "ties", "near", "equal-scores", "edges", "denormal"})
"""Tags of samples with few distinct values, whose roundings may all fall to one side."""
_PATTERN = 0xA5


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Guarded:
    """Copies of tensors with GUARD known bytes before and behind each, so that a write outside shows."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, int]] = []

    def clone(self, value: Any) -> Any:
        """A guarded copy of a contiguous tensor; a plain copy of any other tensor; other values as they are."""
        if not isinstance(value, Tensor) or not value.is_contiguous() or value.is_meta:
            return _clone(value)
        size = value.numel() * value.element_size()
        storage = torch.full((size + 2 * GUARD,), _PATTERN, dtype=torch.uint8, device=value.device)
        self._kept.append((storage, size))
        copy = storage[GUARD : GUARD + size].view(value.dtype).view(value.shape)
        return copy.copy_(value)

    def broken(self) -> bool:
        """Whether any guard byte has changed."""
        return any(bool((s[:GUARD] != _PATTERN).any() or (s[GUARD + n :] != _PATTERN).any()) for s, n in self._kept)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


def call_with_clones(
    contract: Contract, fn: Callable[..., Any], sample: Sample, *, copy: Callable[[Any], Any] = _clone, **extra: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Run `fn` on clones made by `copy`; returns outputs followed by the mutated arguments, and all bound arguments after the call."""
    bound = signature(contract).bind(*map(copy, sample.args), **{k: copy(v) for k, v in sample.kwargs.items()})
    outputs = _flat(fn(*bound.args, **bound.kwargs, **extra))
    bound.apply_defaults()
    return outputs + [bound.arguments[name] for name in contract.mutates], dict(bound.arguments)


def _bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _compare(position: int, y: Tensor, g: Tensor, allowance: Any, share: float, typical: bool) -> tuple[float, str | None]:
    if not g.is_floating_point() or allowance is None:
        same = torch.equal(_bytes(y), _bytes(g.to(y.dtype)))
        return (
            (0.0, None)
            if same
            else (float("inf"), f"output {position}: {int((y != g).sum())} elements differ (must be bitwise equal)")
        )
    if y.numel() == 0:
        return 0.0, None
    y64, g64 = y.double(), g.double()
    if not torch.equal(torch.isfinite(y64), torch.isfinite(g64)) or not torch.equal(y64.isnan(), g64.isnan()):
        return float("inf"), f"output {position}: inf or nan in other places than the golden"
    finite = torch.isfinite(g64)
    # below the smallest normal number roundings are absolute
    smallest = torch.finfo(y.dtype).smallest_normal * roundoff(y.dtype) + torch.finfo(torch.float32).tiny
    allowed = roundoff(y.dtype) * g64.abs() + torch.as_tensor(allowance, dtype=torch.float64) + smallest
    ratio = torch.where(finite, (y64 - g64).abs() / allowed, torch.zeros_like(g64))
    worst = float(ratio.max())
    if worst <= 1:
        bound = torch.as_tensor(allowance, dtype=torch.float64).expand(g64.shape) + smallest
        complaint = _as_a_whole(position, y[finite], g64[finite], bound[finite], share)
        if complaint is None and typical and bool(finite.all()) and (found := gain(y, g64)):
            complaint = f"output {position}: the rows together are {found[0]:+.2e} of their size off, t = {found[1]:.1f}: a factor, or truncation?"
        return worst, complaint
    where = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    return (
        worst,
        f"output {position} at {where}: found {float(y64[where]):.9g}, expected {float(g64[where]):.9g}, error/bound {worst:.3g}",
    )


def _as_a_whole(position: int, y: Tensor, golden: Tensor, bound: Tensor, share: float) -> str | None:
    if found := excess(y, golden, bound, share):
        return f"output {position}: every element is allowed, but the RMS error {found[0]:.3g} is not: at most {found[1]:.3g}"
    if z := lean(y, golden, bound):
        side = "away from" if z > 0 else "towards"
        return f"output {position}: the errors lean {side} zero, z = {z:.1f}: a truncation where a rounding is expected?"
    return None


def golden_of(contract: Contract, sample: Sample) -> list[Tensor]:
    """Exact outputs and mutated arguments: the reference in float64 on clones of the sample."""
    return call_with_clones(contract, contract.reference, sample, compute=torch.float64)[0]


def _strides(t: Tensor) -> list[int]:
    """Strides that decide where elements lie: those of dimensions longer than 1."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def judge(contract: Contract, fn: Callable[..., Any], sample: Sample, *, golden: list[Tensor] | None = None) -> Verdict:
    """Run `fn` on guarded clones of the sample and compare structure, values and untouched arguments with `golden` (default: anew)."""
    golden = golden_of(contract, sample) if golden is None else golden
    guarded = Guarded()
    found, after = call_with_clones(contract, fn, sample, copy=guarded.clone)
    problems: list[str] = []
    if guarded.broken():
        problems.append("bytes outside an argument were written")
    worst = 0.0
    shapes = _flat(contract.meta(*sample.args, **sample.kwargs))
    before = signature(contract).bind(*sample.args, **sample.kwargs).arguments
    for name, value in before.items():
        if isinstance(value, Tensor) and name not in contract.mutates and not torch.equal(_bytes(value), _bytes(after[name])):
            problems.append(f"argument {name} was modified")
    for i, (y, m) in enumerate(zip(found, shapes, strict=False)):
        if y.shape != m.shape or y.dtype != m.dtype:
            problems.append(f"output {i}: found {tuple(y.shape)} {y.dtype}, expected {tuple(m.shape)} {m.dtype}")
        elif _strides(y) != _strides(m):
            problems.append(f"output {i}: found strides {y.stride()} for {tuple(y.shape)}, expected {m.stride()}, those of meta")
    if len(found) != len(golden):
        problems.append(f"found {len(found)} outputs, expected {len(golden)}")
    if not problems:
        allowances = contract.bound(*sample.args, **sample.kwargs, golden=tuple(golden), found=tuple(found))
        if len(allowances) != len(golden):
            raise ValueError(f"{contract.name}: bound returned {len(allowances)} allowances for {len(golden)} outputs")
        for i, (y, g, b) in enumerate(zip(found, golden, allowances, strict=True)):
            if callable(b):
                complaint = b(y)
                ratio = float("inf") if complaint else 0.0
            else:
                ratio, complaint = _compare(i, y, g, b, contract.rms_share, not UNTYPICAL.intersection(sample.tags))
            worst = max(worst, ratio)
            if complaint:
                problems.append(complaint)
    return Verdict(contract.name, sample.name, not problems, worst, tuple(problems))
