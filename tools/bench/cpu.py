"""The CPU backend beside transformers: same weights, same threads, fp32, one run (sections prefill, decode, long, ops, load)."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tools.bench import machine, reading
from tools.bench.own import Own
from tools.bench.peer import Peer
from v4.load import raw_read_gb_per_s

SECTIONS = ("prefill", "decode", "long", "ops", "load")
UNLIKE = 1.15
"""Ratio of bandwidths before and after a group of steps from which on the machine counts as changed in between."""


class Side(Protocol):
    """What is measured, for either implementation."""

    name: str

    def reset(self) -> None:
        """Drop the cache."""

    def prefill(self, ids: Sequence[int], chunk: int | None) -> float:
        """Seconds for a prompt in calls of `chunk` tokens (None: one call)."""

    def step(self) -> float:
        """Seconds for one more token."""

    def synthetic(self, tokens: int, seed: int = 0) -> None:
        """Pretend that `tokens` tokens are stored."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Lengths in tokens."""

    prompt: int = 4096
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)
    groups: int = 24
    steps: int = 8
    long: tuple[int, ...] = (2**18, 2**20)
    long_rounds: int = 2
    long_steps: int = 4
    contexts: tuple[int, ...] = (2**12, 2**14, 2**16, 2**18, 2**20)
    op_rounds: int = 7


QUICK = Sizes(
    prompt=1024, chunks=(256, 512), groups=6, steps=8, long=(2**16,), long_rounds=1, contexts=(2**12, 2**14, 2**16), op_rounds=3
)


def prompt(vocabulary: int, tokens: int) -> list[int]:
    """Random token ids, the same in every run."""
    return torch.randint(2, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def alternate(sides: Sequence[Side], rounds: int, steps: int) -> dict[str, float]:
    """Seconds per token: the median over rounds of the mean over `steps`, the sides taking turns so that noise hits both."""
    means: dict[str, list[float]] = {s.name: [] for s in sides}
    for _ in range(rounds):
        for side in sides:
            means[side.name].append(sum(side.step() for _ in range(steps)) / steps)
    return {name: statistics.median(values) for name, values in means.items()}


def measure_prefill(own: Side, peer: Side, vocabulary: int, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds for the prompt: both sides in one shot and in each chunk length."""
    ids = prompt(vocabulary, sizes.prompt)
    found: dict[str, Any] = {"tokens": sizes.prompt}
    for side in (own, peer):
        side.prefill(ids[:128], None)
        times = {}
        for chunk in (None, *sizes.chunks):
            times["one_shot" if chunk is None else str(chunk)] = seconds = side.prefill(ids, chunk)
            say(f"prefill {side.name} chunk {chunk}: {seconds:.2f} s")
        side.reset()
        found[side.name] = times
    # the fastest form of each side; a user of this project gets chunks without asking
    mine, theirs = min(found["v4"].values()), found["transformers"]
    found["v4_best"] = mine
    found["vs_one_shot"] = theirs["one_shot"] / mine
    found["vs_best_chunking"] = min(theirs.values()) / mine
    return found


def measure_decode(own: Own, peer: Side, vocabulary: int, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds per token after the prompt, and the bandwidth floor of the same run."""
    ids = prompt(vocabulary, sizes.prompt)
    for side in (own, peer):
        side.prefill(ids, min(512, sizes.prompt))
        for _ in range(3):
            side.step()
    needed, meter = own.floor_bytes(sizes.prompt), machine.Meter()
    groups: list[dict[str, float]] = []
    for _ in range(sizes.groups):
        before = meter.now()
        mine = sum(own.step() for _ in range(sizes.steps)) / sizes.steps
        after = meter.now()
        theirs = sum(peer.step() for _ in range(sizes.steps)) / sizes.steps
        rate = (before + after) / 2
        groups.append(
            {
                own.name: mine,
                peer.name: theirs,
                "before": before,
                "after": after,
                "of_floor": needed["total"] / 1e9 / rate / mine,
            }
        )
    steady = [g for g in groups if max(g["before"], g["after"]) < UNLIKE * min(g["before"], g["after"])]
    if not steady:
        raise ValueError(
            f"memory bandwidth changed by more than {UNLIKE - 1:.0%} within each of {len(groups)} groups of steps: is the machine busy?"
        )
    seconds = {side.name: statistics.median(g[side.name] for g in groups) for side in (own, peer)}
    best = statistics.median((g["before"] + g["after"]) / 2 for g in steady)
    floor = needed["total"] / 1e9 / best
    counted = own.op_bytes()
    own.reset()
    peer.reset()
    say(
        f"decode at {sizes.prompt}: {seconds}, floor {floor:.4f} s at {best:.1f} GB/s, of floor {[round(g['of_floor'], 2) for g in groups]}, "
        f"{len(steady)} of {len(groups)} groups steady"
    )
    return {
        "tokens": sizes.prompt,
        "seconds_per_token": seconds,
        "speedup": seconds["transformers"] / seconds["v4"],
        "floor_bytes": needed,
        "contract_bytes": counted,
        "bandwidth": {"best": best, "method": machine.METHOD},
        "groups": groups,
        "steady": len(steady),
        "floor_seconds": floor,
        "of_floor": statistics.median(g["of_floor"] for g in steady),
    }


def measure_long(own: Side, peer: Side, sizes: Sizes, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds per token at long contexts, caches filled synthetically; one side at a time in memory."""
    rows = []
    for tokens in sizes.long:
        start = tokens - 64  # room for the steps below the model's last position
        seconds: dict[str, float] = {}
        for side in (own, peer):
            side.synthetic(start)
            side.step()
            seconds |= alternate((side,), sizes.long_rounds, sizes.long_steps)
            side.reset()
            gc.collect()
        say(f"decode at {tokens}: {seconds}")
        rows.append({"tokens": tokens, "seconds_per_token": seconds, "speedup": seconds["transformers"] / seconds["v4"]})
    return rows


def measure_ops(own: Own, sizes: Sizes, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds per step of each op at each context."""
    rows = []
    for tokens in sizes.contexts:
        own.synthetic(tokens - 64)
        own.op_seconds(1)
        spent = own.op_seconds(sizes.op_rounds)
        own.reset()
        gc.collect()
        say(f"ops at {tokens}: step {spent['step']:.4f} s")
        rows.append({"tokens": tokens, "seconds": spent})
    return rows


def measure_load(directory: Path, say: Callable[[str], None], repeats: int = 8) -> dict[str, Any]:
    """GB/s of loading the checkpoint and of reading it raw, each in a new process, file cache warm for both, taking turns; medians.

    Raw is `v4.load.raw_read_gb_per_s`: every tensor read by safetensors into memory of its own and kept, as a model must keep it.
    """
    raw_read_gb_per_s(directory)
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e9
    taken: dict[str, list[float]] = {"raw": [], "load": []}
    for _ in range(repeats):
        for way, rates in taken.items():
            rates.append(size / reading.apart(directory, way)["seconds"])
    raw, load = (statistics.median(taken[way]) for way in ("raw", "load"))
    found = {"bytes": round(size * 1e9), "raw_gb_per_s": raw, "load_gb_per_s": load, "of_raw": load / raw}
    say(f"load: {found}")
    return found


def run(directory: Path, sections: Sequence[str], sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the sections and return the report (stable keys: see docs/performance.md)."""
    report: dict[str, Any] = {"machine": machine.facts(), "checkpoint": str(directory)}
    if "load" in sections:
        report["load"] = measure_load(directory, say)
    if not set(sections) - {"load"}:
        return report
    own = Own(directory)
    report["parameters"] = sum(p.numel() for p in own.runner.model.parameters())
    report["layers"] = [own.model.config.ratio(i) for i in range(own.model.config.num_hidden_layers)]
    vocabulary = own.model.config.vocab_size
    if "ops" in sections:
        report["ops"] = measure_ops(own, sizes, say)
    if set(sections) & {"prefill", "decode", "long"}:
        peer = Peer(directory)
        report["peer_experts"] = peer.config._experts_implementation
        if "prefill" in sections:
            report["prefill"] = measure_prefill(own, peer, vocabulary, sizes, say)
        if "decode" in sections:
            report["decode"] = measure_decode(own, peer, vocabulary, sizes, say)
        if "long" in sections:
            report["long"] = measure_long(own, peer, sizes, say)
    return report
