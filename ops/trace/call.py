"""One op call of a run: where it happened, its arguments before the call, and what it returned and wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ops.contract import CONTRACTS, Contract, Sample
from ops.registry import signature
from ops.trace.compact import ADDRESSES


@dataclass(frozen=True)
class Link:
    """Where an argument came from: result `output` of call `number`. intact: its bytes are still those that the call returned."""

    number: int
    output: int
    intact: bool


@dataclass(slots=True)
class Call:
    """A call with its tensors.

    number: of all calls of the run, from 0. step: forward pass of the model, from 0. place: "layers.N", "mtp.N" or "head".
    count: which call of this op at this place, from 0 (what a plant calls #STEP). impl: backend that ran it (None: not known).
    arguments: as they were before the call, caches cut to the blocks in use (see `compact`). outputs: results in order.
    written: arguments that had changed after the call, declared or not. sums: argument -> checksum before the call, without caches and
    parameters; output_sums: those of the results. links: argument -> the earlier call that made it.
    """

    number: int
    step: int
    place: str
    op: str
    count: int
    impl: str | None
    arguments: dict[str, Any]
    outputs: list[Tensor] = field(default_factory=list)
    written: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    output_sums: list[int] = field(default_factory=list)
    links: dict[str, Link] = field(default_factory=dict)

    @property
    def contract(self) -> Contract:
        """The op's contract."""
        return CONTRACTS[self.op]

    @property
    def where(self) -> str:
        """Op, place, number of the call there and step, as the commands print them."""
        return f"{self.op}@{self.place}#{self.count} (step {self.step})"

    def known_sum(self, argument: str) -> int | None:
        """Checksum of an argument where it is that of `arguments` too: block tables and slots are renumbered when caches are cut."""
        return None if argument in ADDRESSES else self.sums.get(argument)

    def cpu(self) -> Call:
        """The same call with its tensors on the CPU, where the golden is computed (not every device has float64)."""
        return Call(
            self.number, self.step, self.place, self.op, self.count, self.impl,
            {n: v.cpu() if isinstance(v, Tensor) else v for n, v in self.arguments.items()},
            [t.cpu() for t in self.outputs], {n: t.cpu() for n, t in self.written.items()},
            self.sums, self.output_sums, self.links,
        )  # fmt: skip

    def sample(self) -> Sample:
        """The call's inputs as a sample of the contract."""
        bound = signature(self.contract).bind(**self.arguments)
        return Sample(self.where, bound.args, bound.kwargs, ("recorded",))


def place_order(place: str) -> tuple[int, int]:
    """Sorting key: layers by number, then the head, then MTP blocks."""
    m = re.fullmatch(r"(layers|mtp)\.(\d+)", place)
    return (1, 0) if m is None else ({"layers": 0, "mtp": 2}[m[1]], int(m[2]))
