"""Judging recorded calls: what the recording machine computed, or what another backend computes from the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ops.judge import Verdict, judge
from ops.registry import signature
from ops.trace.call import Call


def recorded_function(call: Call) -> Callable[..., Any]:
    """A function that returns and writes what was recorded, whatever it is given."""
    contract = call.contract

    def again(*args: Any, **kwargs: Any) -> Any:
        given = signature(contract).bind(*args, **kwargs).arguments
        for name, value in call.written.items():
            given[name].copy_(value)
        if not call.outputs:
            return None
        return call.outputs[0] if len(call.outputs) == 1 else tuple(call.outputs)

    return again


def judge_recorded(call: Call) -> Verdict:
    """Whether the recorded results are right for the recorded inputs."""
    return judge(call.contract, recorded_function(call), call.sample())


def judge_again(call: Call, fn: Callable[..., Any]) -> Verdict:
    """Whether `fn` computes the right results from the recorded inputs."""
    return judge(call.contract, fn, call.sample())


@dataclass(frozen=True)
class Finding:
    """What is wrong at one call of a run.

    kind: "bound", the op returned or wrote what its contract does not allow; "changed", an argument is not what the call that made it
    had returned. problems: sentences. worst: error divided by its bound, 0 for "changed".
    """

    number: int
    step: int
    place: str
    op: str
    count: int
    impl: str | None
    kind: str
    worst: float
    problems: tuple[str, ...]

    @property
    def where(self) -> str:
        """OP@PLACE#COUNT, the form that a plant takes."""
        return f"{self.op}@{self.place}#{self.count}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; `worst` is null where it is not finite."""
        worst = self.worst if self.worst < float("inf") else None
        return {**vars(self), "worst": worst, "problems": list(self.problems)}


def _finding(call: Call, kind: str, worst: float, problems: tuple[str, ...]) -> Finding:
    return Finding(call.number, call.step, call.place, call.op, call.count, call.impl, kind, worst, problems)


def changed(call: Call, source: Callable[[int], str]) -> Finding | None:
    """Arguments that something has written to since they were returned. source: number of a call -> its name."""
    problems = tuple(
        f"argument {name} is not what {source(link.number)} returned (result {link.output}): something wrote to it in between; "
        "two kernels share memory, or one did not wait for the other"
        for name, link in call.links.items()
        if not link.intact
    )
    return _finding(call, "changed", 0.0, problems) if problems else None


def finding(call: Call, source: Callable[[int], str]) -> Finding | None:
    """What is wrong at a call whose tensors are there: arguments that changed on the way, else a wrong result; None when it is right."""
    if found := changed(call, source):
        return found
    verdict = judge_recorded(call.cpu())
    return None if verdict.ok else _finding(call, "bound", verdict.worst, verdict.problems)
