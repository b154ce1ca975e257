"""One layer with the real head counts, widths and choices of Flash or Pro, random weights; experts few and narrow unless asked for otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ops.contract import CONTRACTS, Sample
from ops.judge import Verdict, judge
from ops.registry import Binding
from tools.runconfig import named_config
from v4.config import Config
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

KINDS = {"SWA": 0, "CSA": 4, "HCA": 128}


def config_of(name: str, ratio: int, *, hashed: bool = False, experts: int | None = 8, inner: int | None = 256) -> Config:
    """Configuration of Flash or Pro with one layer of a kind; `experts` in number and their width `inner` as published where None."""
    published = named_config(name)
    return replace(
        published, num_hidden_layers=1, compress_ratios=(ratio,), num_hash_layers=int(hashed), num_nextn_predict_layers=0,
        n_routed_experts=experts or published.n_routed_experts, moe_intermediate_size=inner or published.moe_intermediate_size, vocab_size=256,
    )  # fmt: skip


def _codes(shape: torch.Size, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
    return torch.randint(low, high, shape, generator=g)


def _stacked(p: Tensor, g: torch.Generator) -> Tensor:
    """Values of a stack of matrices, one matrix at a time: what is drawn is four or eight times as large as what is kept."""
    value = torch.empty(p.shape, dtype=p.dtype)
    for matrix in value:
        matrix.copy_(torch.randn(p.shape[1:], generator=g) * p.shape[-1] ** -0.5 if p.is_floating_point() else _codes(p.shape[1:], p.dtype, g))
    return value


def fill(module: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Random parameters in place of those without storage."""
    g = torch.Generator().manual_seed(seed)
    for name, p in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        inputs = p.shape[-1] * (2 if p.dtype == torch.uint8 else 1)
        if p.dim() == 3 and p.dtype in (torch.int8, torch.uint8, torch.float32, torch.bfloat16):
            value = _stacked(p, g)
        elif p.dtype in (torch.int8, torch.uint8):
            value = _codes(p.shape, p.dtype, g)
        elif p.dtype == torch.float8_e8m0fnu:
            value = torch.full(p.shape, 2.0 ** (-8 if ".experts." in name else -6))
        elif name.endswith((".scale", ".s13", ".s2")):
            value = (1 + torch.rand(p.shape, generator=g)) * 2.0**-12
        elif p.dtype == torch.float8_e4m3fn:
            value = torch.randn(p.shape, generator=g) * 64 * inputs**-0.5
        elif p.dtype == torch.int64:
            experts = module.get_submodule(owner).weight.shape[0]
            value = torch.stack([torch.randperm(experts, generator=g)[: p.shape[1]] for _ in range(p.shape[0])])
        elif p.dim() == 1:
            value = torch.randn(p.shape, generator=g) * 0.2 + (1.0 if "norm" in name else 0.0)
        else:
            value = torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5
        setattr(module.get_submodule(owner), last, nn.Parameter(value.to(p.dtype).to(device), requires_grad=False))


@dataclass
class Seen:
    """What a run did: per op the labels of the implementations that ran, and verdicts of the calls that were judged."""

    labels: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    verdicts: list[Verdict] = field(default_factory=list)


def watch(binding: Binding, seen: Seen, judged: frozenset[str]) -> SimpleNamespace:
    """The bound ops, each call noted; calls of the ops in `judged` are held against the golden too."""

    def wrapped(op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.labels[op].add(binding.impl_of(op, args, kwargs).label)
            if op in judged:
                seen.verdicts.append(judge(CONTRACTS[op], fn, Sample(op, args, kwargs)))
            return fn(*args, **kwargs)

        return call

    return SimpleNamespace(**{op: wrapped(op, fn) for op, fn in vars(binding.ops).items()})


def run(
    config: Config, binding: Binding, prepare: Callable[[nn.Module], None] | None, device: torch.device, *, stored: int, counts: list[int],
    judged: frozenset[str] = frozenset(), dtype: torch.dtype = torch.bfloat16, linears: str = "dense", experts: str = "dense",
) -> tuple[list[Tensor], Seen]:  # fmt: skip
    """Streams of calls of `counts` tokens behind `stored` synthetic ones, and what ran."""
    seen = Seen()
    model = Model(Settings(config, watch(binding, seen, judged), dtype, linears=linears, experts=experts), mtp=False)
    fill(model, device)
    if prepare is not None:
        prepare(model)
    runner = Runner(model)
    cache = runner.session(max_tokens=stored + sum(counts), max_chunk=max(counts)).cache
    sequence = cache.new_sequence()
    cache.fill_synthetic(sequence, stored) if stored else None
    out = [runner.forward(cache, [sequence], [[(7 * i) % 256 for i in range(n)]]).float().cpu() for n in counts]
    return out, seen
