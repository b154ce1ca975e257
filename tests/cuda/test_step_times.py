"""The measurement of whole steps, walked on the CPU: which ops are counted, and that their floors add up. Its times mean nothing there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backends.cuda.graphs import Replayed
from ops.registry import bind, chain_of
from tests.cuda import graph_checks
from tests.cuda.step_times import Counted, measure
from tools.bench.cuda_clock import Clock
from tools.runconfig import named_config


def test_a_step_is_measured_beside_the_floors_of_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(graph_checks, "Replayed", lambda fn, device: Replayed(fn, device, lambda f, given: lambda: f(given)))
    small = {"hidden_size": 256, "n_routed_experts": 8, "moe_intermediate_size": 64, "vocab_size": 100}
    config = replace(named_config("flash"), num_hidden_layers=1, compress_ratios=(4, 0), num_hash_layers=0, **small)
    counted = Counted(bind(chain_of("cpu"), dtype=torch.bfloat16).ops)
    runner = graph_checks.flash_slice(cpu, counted.ops, sliced=config)
    ceiling = {"bytes": 1e12, "bf16": 1e15, "tf32": 5e14, "fp8": 2e15}
    rows = [measure(runner, counted, Clock(cpu, 2), ceiling, context, 2) for context in (100, 900)]
    for row in rows:
        floors = row["floor_ms_by_op"]
        assert floors.keys() >= {"sparse_attention", "index_topk", "grouped_experts_fp4", "compress", "linear", "hc_pre"}
        assert sum(floors.values()) == pytest.approx(row["floor_ms"]) and row["share"] == pytest.approx(row["floor_ms"] / max(row["graph_ms"]))
        assert len(row["graph_ms"]) in (1, 2, 3)
    # more context costs the choice more, and the experts nothing
    first, second = (row["floor_ms_by_op"] for row in rows)
    assert second["index_topk"] > 2 * first["index_topk"] and second["linear"] == first["linear"]
