"""The model of an evaluation, with planted faults in, and checks that all of them were reached."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

import v4
from ops.mutants import Plant
from ops.registry import parse_overrides
from tools.runconfig import nearest
from v4.config import Config
from v4.settings import Scope
from v4.tokenizer import Tokenizer


@dataclass
class Subject:
    """A loaded model, its tokenizer, and the faults planted in it."""

    model: v4.LoadedModel
    tokenizer: Tokenizer
    plants: tuple[Plant, ...]
    reached: set[Plant] = field(default_factory=set)

    def check(self) -> None:
        """ValueError when a planted fault was never reached: the figures would be those of the correct model."""
        if missed := [str(p) for p in self.plants if p not in self.reached]:
            raise ValueError(
                f"planted fault {', '.join(missed)} was never reached: no such call in this run; "
                "v4 trace record --no-tensors shows which calls there are"
            )


def open_model(args: argparse.Namespace, *, mtp: bool = False, watch: Scope | None = None) -> Subject:
    """Load what the options ask for, with the MTP block where it is wanted.

    watch: wraps the ops of each part outside of planted faults, for recorders.

    ValueError for a missing directory, a checkpoint without tokenizer, or an unknown fault or place.
    """
    if args.trials < 1:
        raise ValueError(f"--trials {args.trials}: expected at least 1")
    path = Path(args.model)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; expected a checkpoint")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: has no tokenizer.json; the evaluation writes text")
    config = Config.from_file(path)
    plants = tuple(Plant.parse(text) for text in args.plant or ())
    known = [*(f"layers.{i}" for i in range(config.num_hidden_layers)), "head"]
    if mtp:
        known += [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]
    for plant in plants:
        if plant.place not in (None, *known):
            raise ValueError(f"--plant {plant}: the model has no part {plant.place!r}{nearest(plant.place, known)}")
    reached: set[Plant] = set()

    def scope(place: str, ops: SimpleNamespace) -> SimpleNamespace:
        for plant in plants:
            ops = plant.scope(place, ops, reached)
        return ops if watch is None else watch(place, ops)

    model = v4.load(
        path, backend=args.backend, dtype=getattr(torch, args.dtype), numerics=args.numerics, strict=args.strict, mtp=mtp,
        batch_invariant=getattr(args, "batch_invariant", False),
        ops=parse_overrides(args.ops) if args.ops else None, scope=scope if plants or watch else None,
    )  # fmt: skip
    assert model.tokenizer is not None
    return Subject(model, model.tokenizer, plants, reached)


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What a report says about how it was made."""
    keys = ("kind", "model", "backend", "dtype", "numerics", "seed", "trials")
    return {**{k: getattr(args, k) for k in keys}, "plants": list(args.plant or ())}


def interval(right: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = right / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
