"""Decode steps of V4-Flash's layers on a device: a replayed graph's time beside the sum of its ops' floors.

`python -m tests.cuda.step_times --json build/steps.json`: one layer of each kind together, then each kind alone, over FP4 experts with random
weights and caches of random rows. No test framework is needed, so that it runs wherever torch and Triton do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ops.contract import CONTRACTS, Cost
from ops.registry import bind, chain_of
from tests.cuda.graph_checks import flash_slice, recording
from tools.bench.cuda import RATES, light
from tools.bench.cuda_clock import Clock, ceilings
from tools.runconfig import named_config
from v4.runner import Runner

KINDS = {"window": 0, "CSA": 4, "HCA": 128}
TOGETHER = ((4096, 1), (131072, 1), (1048544, 1), (4096, 32), (4096, 128))
"""Context and requests of steps through one layer of each kind."""
ALONE = ((131072, 1), (131072, 128))


class Counted:
    """Ops that note what their contracts say they cost, while `on`."""

    def __init__(self, ops: SimpleNamespace) -> None:
        self.on = False
        self.costs: list[tuple[str, Cost]] = []
        self.ops = SimpleNamespace(**{name: self._noting(name, fn) for name, fn in vars(ops).items()})

    def _noting(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.costs.append((name, CONTRACTS[name].cost(*map(light, args), **{k: light(v) for k, v in kwargs.items()})))
            return fn(*args, **kwargs)

        return call if name in CONTRACTS else fn


def measure(runner: Runner, counted: Counted, clock: Clock, ceiling: dict[str, float], context: int, batch: int) -> dict[str, Any]:
    """One step of `batch` requests with `context` tokens each: milliseconds of the replayed graphs (one per set of shapes) and of eager calls.

    The floor of an op is the larger of its bytes and its products at the ceilings; `floor_ms` is their sum.
    """
    cache = runner.session(max_tokens=context + 16, max_sequences=batch, max_chunk=16).cache
    sequences = [cache.new_sequence() for _ in range(batch)]
    for sequence in sequences:
        cache.assume(sequence, context)
    for pool in cache.pools():
        if pool.is_floating_point():
            pool.normal_()
        else:
            pool.random_(0, 96)
    ids = [[(997 * b + 5) % runner.model.config.vocab_size] for b in range(batch)]

    def step(run: Runner) -> float:
        began = time.perf_counter()
        run.forward(cache, sequences, ids)
        if clock.real:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3

    counted.costs.clear()
    counted.on = True
    step(runner)
    counted.on = False
    for sequence in sequences:
        sequence.rollback(1)
    eager = min(step(runner) for _ in range(3))
    run, made = recording(runner)
    for _ in range(8):
        step(run)
    graphs = [clock.between(replay) * 1e3 for replay in made[0].replays()]
    floors: Counter[str] = Counter()
    for name, cost in counted.costs:
        floors[name] += max(cost.bytes / ceiling["bytes"], cost.matmul_flops / ceiling[RATES[cost.rate]]) * 1e3
    total = sum(floors.values())
    return {
        "context": context, "batch": batch, "graph_ms": graphs, "eager_ms": eager, "floor_ms": total, "share": total / max(graphs),
        "floor_ms_by_op": dict(floors),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 2 without a device."""
    options = argparse.ArgumentParser(prog="python -m tests.cuda.step_times", description=__doc__)
    options.add_argument("--json", type=Path, required=True)
    path: Path = options.parse_args(argv).json
    if not torch.cuda.is_available():
        print("step_times: no CUDA device", file=sys.stderr)
        return 2
    device, clock = torch.device("cuda"), Clock(torch.device("cuda"), 15)
    ceiling = ceilings(clock)
    counted = Counted(bind(chain_of("cuda"), dtype=torch.bfloat16).ops)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceiling, "steps": []}

    def tell(runner: Runner, layers: str, cases: tuple[tuple[int, int], ...]) -> None:
        for context, batch in cases:
            row = {"layers": layers, **measure(runner, counted, clock, ceiling, context, batch)}
            print({k: v for k, v in row.items() if k != "floor_ms_by_op"}, flush=True)
            found["steps"].append(row)
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")

    tell(flash_slice(device, counted.ops), " + ".join(KINDS), TOGETHER)
    whole = named_config("flash")
    for layers, ratio in KINDS.items():
        alone = replace(whole, num_hidden_layers=1, compress_ratios=(ratio, 0), num_hash_layers=0)
        tell(flash_slice(device, counted.ops, sliced=alone), layers, ALONE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
