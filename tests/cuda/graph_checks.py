"""Recorded steps on a device against eager ones; no test framework is needed, so that they run wherever torch and Triton do."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import v4
from backends.cuda.graphs import Function, Replayed
from ops.host_reads import NotRecordable
from tests import tiny
from tools.runconfig import named_config
from v4.api import LoadedModel
from v4.cache import Cache
from v4.config import Config
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"numerics": "stored"},
    "simulated": {"numerics": "reference"},
}


def load(name: str = "flash", **settings: Any) -> LoadedModel:
    """A tiny model on the device."""
    return v4.load(tiny.checkpoint(name), backend="cuda", **settings)


def caches(runner: Runner, lengths: tuple[int, ...], most: int = 512) -> tuple[Cache, list[Any]]:
    """A cache for `most` tokens a sequence with synthetic contexts of these lengths."""
    cache = runner.session(max_tokens=most, max_sequences=len(lengths), max_chunk=16).cache
    sequences = [cache.new_sequence() for _ in lengths]
    for sequence, length in zip(sequences[1:], lengths[1:], strict=True):
        cache.assume(sequence, length)
    cache.fill_synthetic(sequences[0], lengths[0])  # every row of the pools, whoever's it is
    return cache, sequences


def recording(runner: Runner) -> tuple[Runner, list[Replayed]]:
    """A runner of the same model whose single steps are graphs, and what holds the graphs of each cache."""
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device))
        return made[-1]

    return Runner(runner.model, replayed), made


def steps_differ(model: LoadedModel, lengths: tuple[int, ...], steps: int) -> list[str]:
    """What differs between eager and recorded steps, bitwise; replays run under torch's alarm for host synchronisation."""
    cache, sequences = caches(model.runner, lengths)
    other, others = caches(model.runner, lengths)
    runner, made = recording(model.runner)
    tokens, wrong = [3 + b for b in range(len(lengths))], []
    for step in range(steps):
        eager = model.runner.forward(cache, sequences, [[t] for t in tokens])
        shapes = made[0].held if made else 0
        new = [[t] for t in tokens]
        found = runner.forward(other, others, new)
        if made[0].held == shapes:
            # a shape that was recorded before: the step once more (it writes the same rows), with the alarm on
            for sequence in others:
                sequence.rollback(1)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = runner.forward(other, others, new)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if not torch.equal(eager, found):
            wrong.append(f"step {step}: streams differ by {(eager - found).abs().max().item():.3g}")
        tokens = model.runner.logits(eager).argmax(-1).tolist()
    if not made[0].held < steps:
        wrong.append(f"{made[0].held} shapes in {steps} steps: nothing was replayed")
    wrong += [f"pool {i} differs" for i, (a, b) in enumerate(zip(cache.pools(), other.pools(), strict=True)) if not torch.equal(a, b)]
    return wrong


def texts_differ(model: LoadedModel, new: int) -> list[str]:
    """Whether generation gives other tokens when it is recorded."""
    ids = tiny.tokens(121)
    found = [model.generate(ids, new, stop=[], recorded=recorded).tokens for recorded in (False, True)]
    return [] if found[0] == found[1] else [f"tokens differ from place {next(i for i, (a, b) in enumerate(zip(*found, strict=True)) if a != b)}"]


def refusal(model: LoadedModel) -> str:
    """The message with which a step over plain torch is refused; empty when it was recorded."""
    cache, sequences = caches(model.runner, (40,))
    try:
        recording(model.runner)[0].forward(cache, sequences, [[3]])
    except NotRecordable as error:
        return str(error)
    return ""


def flash_slice(device: torch.device, ops: SimpleNamespace, *, config: Config | None = None, sliced: Config | None = None) -> Runner:
    """One layer of each kind at V4-Flash's widths (or of `config`), or the layers of `sliced`, with FP4 experts and random weights.

    Made on the device; three layers of V4-Flash take about 11 GB.
    """
    whole = config or named_config("flash")
    config = sliced or replace(whole, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)
    model = Model(Settings(config, ops, torch.bfloat16, experts="fp4"), mtp=False)
    g = torch.Generator(device=device).manual_seed(0)
    for name, p in list(model.named_parameters()):
        shape = tuple(p.shape)
        if p.dtype == torch.int64:
            value = torch.randint(0, config.n_routed_experts, shape, generator=g, device=device)
        elif p.dtype == torch.uint8:
            value = torch.randint(0, 256, shape, generator=g, device=device, dtype=torch.uint8)
        elif p.dtype == torch.float8_e8m0fnu:
            value = torch.randint(116, 121, shape, generator=g, device=device, dtype=torch.uint8).view(p.dtype)
        else:
            value = torch.randn(shape, generator=g, device=device, dtype=p.dtype) * (0.02 if p.dim() > 1 else 1.0)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return Runner(model)


def times(runner: Runner, length: int, steps: int, batch: int = 1) -> dict[str, float]:
    """Median milliseconds of a greedy step, eager and recorded, the reading of its tokens included."""

    def median(run: Runner) -> float:
        cache, sequences = caches(runner, (length,) * batch, length + steps)
        seen, tokens = [], [5] * batch
        for _ in range(steps):
            began = time.perf_counter()
            tokens = run.logits(run.forward(cache, sequences, [[t] for t in tokens])).argmax(-1).tolist()
            seen.append(time.perf_counter() - began)
        return statistics.median(seen[steps // 3 :]) * 1e3

    return {"eager_ms": median(runner), "recorded_ms": median(recording(runner)[0])}
