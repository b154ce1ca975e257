"""`python -m tools.bench cuda`: every case is verified against the contract, then timed beside its floor, torch eager and torch.compile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.contract import CONTRACTS, Contract, Sample
from ops.judge import golden_of, judge
from ops.registry import load_backend, on_device, unavailable
from tools.bench.cuda_attention import cases
from tools.bench.cuda_cases import FLASH, TINY, Case, Inputs
from tools.bench.cuda_clock import Clock, ceilings

BACKEND, PLAIN = "cuda_triton", "cuda"
_L2_BYTES = 60 << 20
RATES = {"fp32": "tf32", "bf16": "bf16", "fp8": "fp8", "fp4": "fp8", "int8": "fp8"}
"""The ceiling that products of a contract's rate are held against."""


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [v for v in (*inputs.args, *inputs.kwargs.values()) if isinstance(v, Tensor)]


def verify(contract: Contract, case: Case, inputs: Inputs, found: Any, device: torch.device) -> float:
    """Judge the result for the first, middle and last token; the largest error / bound. ValueError when it is wrong."""
    tokens = sorted({0, case.tokens // 2, case.tokens - 1})
    part, outputs = case.part(inputs, tokens)
    sample = Sample(case.name, part.args, part.kwargs)
    if outputs is None:
        fn = contract.impls[BACKEND].fn
        verdict = judge(contract, on_device(fn, contract, device) if device.type == "cuda" else fn, sample)
    else:
        given = outputs(found)
        verdict = judge(contract, lambda *args, **kwargs: given, sample, golden=golden_of(contract, sample))
    if not verdict.ok:
        raise ValueError(f"{case.name} is wrong: {verdict}")
    return verdict.worst


def light(value: Any) -> Any:
    """An argument for a cost function, which reads lengths, wanted on the host, and no data."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu() if value.dtype in (torch.int32, torch.int64) else value.to("meta")


def _floor(contract: Contract, inputs: Inputs, ceiling: dict[str, float]) -> tuple[float, str, dict[str, float]]:
    """Seconds of the floor, what binds, and the work."""
    cost = contract.cost(*map(light, inputs.args), **{k: light(v) for k, v in inputs.kwargs.items()})
    bound = {"memory": cost.bytes / ceiling["bytes"], "matrix": cost.matmul_flops / ceiling[RATES[cost.rate]]}
    binds = max(bound, key=lambda k: bound[k])
    return bound[binds], binds, {"bytes": cost.bytes, "matmul_flops": cost.matmul_flops}


def _sets(case: Case, first: Inputs, g: torch.Generator) -> list[Inputs]:
    size = sum(t.numel() * t.element_size() for t in _tensors(first))
    wanted = 1 if case.prefill else min(math.ceil(2 * _L2_BYTES / max(size, 1)), 8)
    return [first, *(case.make(g) for _ in range(wanted - 1))]


def _baselines(contract: Contract, case: Case, inputs: Inputs, clock: Clock) -> dict[str, Any]:
    """Seconds of plain torch, called from Python and compiled; what can not be captured is said instead."""
    plain = contract.impls[PLAIN].fn
    found: dict[str, Any] = {"eager_seconds": clock.eager(lambda: plain(*inputs.args, **inputs.kwargs))}
    if case.compiled:
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=False, backend="inductor" if clock.real else "eager")
        call = lambda: compiled(*inputs.args, **inputs.kwargs)  # noqa: E731
        try:
            found["compiled_seconds"] = clock.cold(call) if case.prefill else clock.replayed([call] * 8)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            found["compiled_refused"] = str(error).splitlines()[0]
            if clock.real:
                torch.cuda.synchronize()
    return found


def measure(case: Case, clock: Clock, ceiling: dict[str, float], baselines: bool) -> dict[str, Any]:
    """One row of the report. ValueError when the result is wrong or the kernel does not take the case."""
    contract = CONTRACTS[case.op]
    impl = contract.impls[BACKEND]
    g = torch.Generator(device=clock.device).manual_seed(1)
    inputs = case.make(g)
    if impl.when is None or not impl.when(*inputs.args, **inputs.kwargs):
        raise ValueError(f"{case.name}: the shape rule of {BACKEND} refuses it; nothing to measure")
    worst = verify(contract, case, inputs, impl.fn(*inputs.args, **inputs.kwargs), clock.device)
    sets = _sets(case, inputs, g)
    calls: list[Callable[[], Any]] = [lambda i=i: impl.fn(*i.args, **i.kwargs) for i in sets]  # type: ignore[misc]
    seconds = clock.cold(calls[0]) if case.prefill else clock.replayed([calls[i % len(calls)] for i in range(8)])
    floor, binds, work = _floor(contract, inputs, ceiling)
    row: dict[str, Any] = {
        "op": case.op, "case": case.name, "tokens": case.tokens, "seconds": seconds, "floor_seconds": floor, "binds": binds,
        "share": floor / seconds, **work, "worst_error_over_bound": worst, "input_sets": len(sets), "way": "cold" if case.prefill else "graph",
    }  # fmt: skip
    if baselines:
        row.update(_baselines(contract, case, inputs, clock))
    return row


def run(wanted: Sequence[str], dry: bool, say: Callable[[str], None], baselines: bool = True, budget: float = math.inf) -> dict[str, Any]:
    """The report. wanted: ops (empty: all). budget: seconds after which no case is begun any more; those left are listed.

    ValueError without a device (unless `dry`), or for an op without a case.
    """
    load_backend(BACKEND)
    load_backend(PLAIN)
    if dry:
        from backends.cuda_triton import interpreter

        interpreter.repair()
    elif why := unavailable(BACKEND):
        raise ValueError(f"{why}; --dry-run walks every path on the CPU, under Triton's interpreter")
    todo = [c for c in cases(TINY if dry else FLASH, dry) if not wanted or c.op in wanted]
    if unknown := set(wanted) - {c.op for c in todo}:
        raise ValueError(f"no case for {', '.join(sorted(unknown))}")
    began = time.monotonic()
    clock = Clock(torch.device("cpu" if dry else "cuda"), 2 if dry else 20)
    load_backend(BACKEND).probe()
    ceiling = ceilings(clock)
    say("ceilings " + ", ".join(f"{k} {v:.3g}" for k, v in ceiling.items()))
    rows, wrong, left = [], [], []
    for case in todo:
        if time.monotonic() - began > budget:
            left.append(case.name)
            continue
        try:
            rows.append(measure(case, clock, ceiling, baselines))
        except (ValueError, RuntimeError) as error:
            wrong.append({"case": case.name, "error": str(error)})
            say(f"FAILED {case.name}: {error}")
            continue
        say(f"{case.name}: {rows[-1]['seconds'] * 1e6:.1f} us, floor {rows[-1]['floor_seconds'] * 1e6:.1f} us")
    device = "none, dry run: figures mean nothing" if dry else torch.cuda.get_device_name()
    return {"device": device, "dry_run": dry, "torch": torch.__version__, "ceilings": ceiling, "rows": rows, "failed": wrong, "not_run": left}
