"""Finding a fault that no call shows by itself: the run repeated with one op after another swapped for that of another backend.

The runs are held against one in which every op is swapped, by the logits of the same tokens. How far two correct runs may lie apart is
measured too: the swapped run again with every result off by its last bit at random.

Shapes: S steps, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ops.bounds import roundoff
from ops.contract import CONTRACTS
from ops.registry import bind, chain_of
from tools import generate
from tools.trace.progress import counted

Where = tuple[str, str, int]
"""Place, op, number of the call there."""

CLEAR = 4.0
"""How many times farther than two correct runs a run must lie from the swapped one to be called wrong."""
REPAIRS = 0.5
"""A swap that leaves at most this share of the distance repairs the run."""


@dataclass(frozen=True)
class Swap:
    """Calls that are swapped: those of an op (None: every op), at a place (None: everywhere), from call `first` on."""

    op: str | None = None
    place: str | None = None
    first: int = 0

    def __call__(self, where: Where) -> bool:
        """Whether the call is one of them."""
        place, op, count = where
        return self.op in (None, op) and self.place in (None, place) and count >= self.first


ALL, NONE = Swap(), Swap("")


@dataclass
class Bench:
    """A model whose ops can be swapped from run to run, and the tokens it is run on: the prompt in one pass, then one by one."""

    request: generate.Request
    tokens: Sequence[int]
    against: str

    def __post_init__(self) -> None:
        self._swap = NONE
        self._noise: torch.Generator | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self.seen: list[Where] = []
        self._model = generate.load(self.request, self._scope)
        dtype = getattr(torch, self.request.settings.dtype)
        self._other = bind(chain_of(self.against, strict=True), dtype=dtype).ops

    def _scope(self, place: str, ops: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(**{op: self._either(place, op, fn) for op, fn in vars(ops).items()})

    def _either(self, place: str, op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            where = (place, op, self._counts[place, op])
            self._counts[place, op] += 1
            self.seen.append(where)
            if not self._swap(where):
                return fn(*args, **kwargs)
            found = getattr(self._other, op)(*args, **kwargs)
            return found if self._noise is None or CONTRACTS[op].choices else _shaken(found, self._noise)

        return call

    @torch.inference_mode()
    def logits(self, swap: Swap, noise: int | None = None) -> Tensor:
        """Logits fp32 [S, V] of the last prompt token and of every generated one, with the calls of `swap` swapped.

        noise: seed of last-bit errors in the results of swapped calls.
        """
        self._swap, self._counts, self.seen = swap, Counter(), []
        self._noise = None if noise is None else torch.Generator().manual_seed(noise)
        runner, ids = self._model.runner, self.request.ids
        cache = runner.session(max_tokens=len(ids) + len(self.tokens), max_chunk=len(ids)).cache
        sequence = cache.new_sequence()
        rows = [runner.logits(runner.forward(cache, [sequence], [ids])[-1:])]
        for token in self.tokens[:-1]:
            rows.append(runner.logits(runner.forward(cache, [sequence], [[token]])))
        return torch.cat(rows).cpu()


def _shaken(found: Any, generator: torch.Generator) -> Any:
    if isinstance(found, Tensor):
        if not found.is_floating_point() or found.dtype.itemsize < 2:
            return found
        sign = torch.randint(0, 2, found.shape, generator=generator, dtype=torch.int8).to(found.device) * 2.0 - 1.0
        return (found.float() * (1 + roundoff(found.dtype) * sign)).to(found.dtype)
    return None if found is None else tuple(_shaken(f, generator) for f in found)


def distance(a: Tensor, b: Tensor) -> float:
    """RMS of the difference as a share of the RMS of b; infinite where one has a NaN that the other has not."""
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num().double(), b.nan_to_num().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-300))


def _first_step(bench: Bench, op: str, place: str, calls: int, golden: Tensor, allowed: float) -> int:
    """The first call from which on the op must be swapped for the run to be right."""
    low, high = 0, calls - 1  # the run is right when all calls from `low` on are swapped, wrong when only those after `high` are
    while low < high:
        middle = (low + high + 1) // 2
        if distance(bench.logits(Swap(op, place, middle)), golden) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low


def search(request: generate.Request, tokens: Sequence[int], against: str) -> dict[str, Any]:
    """Ops whose swap repairs the run, then the place and the first call of each.

    Returns {found: list of {op, place, count, distance}, distance, noise, by_op, sentences}. `found` is empty when the run lies no farther from
    the swapped one than correct runs do, or when no single op repairs it; `sentences` say which.
    """
    bench = Bench(request, tokens, against)
    golden = bench.logits(ALL)
    off = distance(bench.logits(NONE), golden)
    calls = Counter(where[:2] for where in bench.seen)
    noise = max(distance(bench.logits(ALL, seed), golden) for seed in (1, 2))
    result: dict[str, Any] = {"against": against, "distance": off, "noise": noise, "by_op": {}, "found": []}
    if off <= CLEAR * noise:
        said = f"the run lies {off:.2e} from one on {against} (RMS of logits, relative); two correct runs lie up to {noise:.2e} apart: no fault shows"
        return {**result, "sentences": [said]}
    ops = sorted({op for _, op in calls})
    for op in counted(ops, len(ops), "swap"):
        result["by_op"][op] = distance(bench.logits(Swap(op)), golden)
    allowed = max(REPAIRS * off, CLEAR * noise)
    guilty = [op for op in ops if result["by_op"][op] <= allowed]
    sentences = [
        f"every call is right by itself, but the run lies {off:.2e} from one on {against}, where correct runs lie {noise:.2e} apart"
    ]
    for op in guilty:
        places = [p for p, o in calls if o == op]
        by_place = {p: distance(bench.logits(Swap(op, p)), golden) for p in places}
        place = min(by_place, key=lambda p: by_place[p])
        if by_place[place] > allowed:
            result["found"].append({"op": op, "place": None, "count": None, "distance": result["by_op"][op]})
            sentences.append(f"FAULT NEEDS {op}: swapped everywhere it leaves {result['by_op'][op]:.2e}; no single place does")
            continue
        # one wrong call of many can be a small part of the distance: held against what the swap leaves, not against the whole
        count = _first_step(bench, op, place, calls[place, op], golden, max(CLEAR * noise, 2 * by_place[place]))
        result["found"].append({"op": op, "place": place, "count": count, "distance": by_place[place]})
        sentences.append(f"FAULT NEEDS {op}@{place}#{count}: swapped there it leaves {by_place[place]:.2e}")
    if not guilty:
        sentences.append("no single op repairs it when swapped: more than one is wrong, or what is wrong is no op")
    return {**result, "sentences": sentences}
