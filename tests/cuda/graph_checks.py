"""Recorded steps on a device against eager ones; no test framework is needed, so that they run wherever torch and Triton do."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import v4
from backends.cuda.graphs import Function, Replayed
from ops.host_reads import NotRecordable
from tests import tiny
from v4.api import LoadedModel
from v4.cache import Cache
from v4.runner import Runner

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"numerics": "stored"},
    "simulated": {"numerics": "reference"},
}


def load(name: str = "flash", **settings: Any) -> LoadedModel:
    """A tiny model on the device."""
    return v4.load(tiny.checkpoint(name), backend="cuda", **settings)


def caches(model: LoadedModel, lengths: tuple[int, ...]) -> tuple[Cache, list[Any]]:
    """A cache with synthetic contexts of these lengths."""
    cache = model.runner.session(max_tokens=512, max_sequences=len(lengths), max_chunk=16).cache
    sequences = [cache.new_sequence() for _ in lengths]
    for seed, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        cache.fill_synthetic(sequence, length, seed)
    return cache, sequences


def recording(model: LoadedModel) -> tuple[Runner, list[Replayed]]:
    """A runner of the same model whose single steps are graphs, and what holds the graphs of each cache."""
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device))
        return made[-1]

    return Runner(model.runner.model, replayed), made


def steps_differ(model: LoadedModel, lengths: tuple[int, ...], steps: int) -> list[str]:
    """What differs between eager and recorded steps, bitwise; replays run under torch's alarm for host synchronisation."""
    cache, sequences = caches(model, lengths)
    other, others = caches(model, lengths)
    runner, made = recording(model)
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
    cache, sequences = caches(model, (40,))
    try:
        recording(model)[0].forward(cache, sequences, [[3]])
    except NotRecordable as error:
        return str(error)
    return ""


def times(model: LoadedModel, length: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a greedy step, eager and recorded, the reading of its token included."""

    def median(step: Any) -> float:
        seen, token = [], 5
        for _ in range(steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            logits: Tensor = step(token)
            token = int(logits.argmax(-1)[0])
            seen.append(time.perf_counter() - began)
        return sorted(seen[steps // 3 :])[(steps - steps // 3) // 2] * 1e3

    found = {}
    for name, runner in (("eager_ms", model.runner), ("recorded_ms", recording(model)[0])):
        cache, sequences = caches(model, (length,))
        found[name] = median(lambda token, r=runner, c=cache, s=sequences: r.logits(r.forward(c, s, [[token]])))
    return found
