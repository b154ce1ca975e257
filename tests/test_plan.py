"""`v4 plan`: the published cost figures come out of configurations, tensor tables and contracts' cost functions."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from ops.contract import CONTRACTS
from tools import costing, plan, v32
from tools.cli import main
from tools.runconfig import CONFIGS, named_config
from v4.cache import Format
from v4.config import Config
from v4.tensors import checkpoint_tensors

MILLION = 2**20


@cache
def report(name: str, context: int = MILLION) -> dict[str, Any]:
    return plan.report(name, context)


@cache
def ledger(name: str, context: int = MILLION) -> costing.Ledger:
    return costing.decode_ledger(named_config(name), context)


def formula(c: Config, context: int) -> dict[str, float]:
    """FLOPs per decoded token by the sums of specification section 12.2."""
    d, h, ql, i, e = c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.moe_intermediate_size, c.n_routed_experts
    k, hd, g, r = c.num_experts_per_tok, c.head_dim, c.o_groups, c.o_lora_rank
    index = c.index_n_heads * c.index_head_dim
    total = {"linear": 0.0, "head": 2.0 * c.vocab_size * d, "core": 0.0, "index": 0.0}
    for layer in range(c.num_hidden_layers):
        m = c.ratio(layer)
        weights = d * ql + ql * hd * h + hd * d + hd * h * r + r * g * d + 3 * d * i + k * 3 * d * i + e * d + 2 * 24 * 4 * d
        rows = c.sliding_window
        if m == 4:
            weights += ql * index + c.index_n_heads * d + 2 * 2 * hd * d + 2 * 2 * c.index_head_dim * d
            rows += c.index_topk
            total["index"] += context // 4 * index * 2
        elif m:
            weights += 2 * hd * d
            rows += context // m
        total["linear"] += 2 * weights
        total["core"] += rows * h * hd * 4
    return total


@pytest.mark.parametrize(("name", "per_token", "share"), [("flash", 3514.25, 0.0731), ("pro", 5031.4375, 0.1047)])
def test_cache_bytes(name: str, per_token: float, share: float) -> None:
    r = report(name)
    assert r["cache_bytes_per_token"] == per_token
    assert r["v32"]["cache_bytes_per_token"] == 48068
    assert r["cache_vs_v32"] == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize(
    ("fmt", "flash", "pro"), [(Format("fp8", "fp8"), 3850.25, 5511.4375), (Format("plain", "plain"), 6880, 9848)]
)
def test_cache_bytes_of_other_formats(fmt: Format, flash: float, pro: float) -> None:
    assert costing.bytes_per_token(named_config("flash"), fmt) == flash
    assert costing.bytes_per_token(named_config("pro"), fmt) == pro


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_sequence_bytes_grow_by_the_bytes_per_token(name: str) -> None:
    config, block = named_config(name), 128 * 16
    longer = costing.sequence_bytes(config, MILLION) - costing.sequence_bytes(config, MILLION - block)
    assert longer == block * costing.bytes_per_token(config)


# specification section 12.2: rows of its table of weightings; its own figures are given to the digits checked here
RATIOS = {
    ("flash", MILLION): {"raw": 12.1, "equivalent_fp8": 10.08, "core_x2_index_half": 9.97, "core_x2": 13.8, "index_half": 8.2},
    ("pro", MILLION): {"raw": 26.2, "equivalent_fp8": 26.69, "core_x2_index_half": 26.45, "core_x2": 31.9, "index_half": 20.6},
    ("flash", 10**6): {"equivalent_fp8": 10.15, "core_x2_index_half": 10.03, "core_x2": 13.8, "index_half": 8.3},
    ("pro", 10**6): {"equivalent_fp8": 27.02, "core_x2_index_half": 26.78, "core_x2": 32.2, "index_half": 21.0},
}


@pytest.mark.parametrize(("name", "context"), RATIOS)
def test_flop_shares_of_v32(name: str, context: int) -> None:
    found = report(name, context)["flops_vs_v32"]
    for weighting, percent in RATIOS[name, context].items():
        digits = len(str(percent).split(".")[1])
        # one unit of the last digit given: the specification truncates some of them
        assert 100 * found[weighting] == pytest.approx(percent, abs=0.6 * 10**-digits), weighting


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("context", [4096, MILLION])
def test_ledger_of_the_graph_agrees_with_the_published_sums(name: str, context: int) -> None:
    expected = formula(named_config(name), context)
    for group, flops in expected.items():
        # the sums leave out the head's collapse of the streams
        assert ledger(name, context).flops("raw", group) == pytest.approx(flops, rel=1e-4), group


def test_v32_sums() -> None:
    found = v32.decode_ledger(v32.V32.from_file(CONFIGS / "v32.json"), MILLION)
    gigaflops = {group: found.flops("raw", group) / 1e9 for group in ("linear", "head", "core", "index")}
    assert gigaflops == pytest.approx({"linear": 73.1, "head": 1.85, "core": 34.8, "index": 1048.0}, rel=2e-3)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_every_product_counts_by_its_stored_type(name: str) -> None:
    rates = {(c.op, c.rate) for c in ledger(name).calls if c.cost.matmul_flops}
    assert ("grouped_linear", "fp8") in rates  # wo_a is stored in FP8
    assert ("linear_fp8", "fp8") in rates
    assert ("grouped_experts_fp4", "fp8") in rates
    assert ("index_topk", "fp4") in rates
    wide = ("linear", "sparse_attention", "compress", "gate_topk", "hc_pre")
    assert {rate for op, rate in rates if op in wide} <= {"bf16", "fp32"}


def test_ledger_follows_the_configuration() -> None:
    c = named_config("tiny")
    base = costing.decode_ledger(c, 4096)
    wider = costing.decode_ledger(replace(c, index_topk=2 * c.index_topk), 4096)
    csa = sum(c.ratio(i) == 4 for i in range(c.num_hidden_layers))
    more = csa * c.index_topk * c.num_attention_heads * c.head_dim * 4
    assert wider.flops("raw", "core") - base.flops("raw", "core") == more
    assert wider.flops("raw", "index") == base.flops("raw", "index")


def test_ledger_follows_the_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    c, contract = named_config("tiny"), CONTRACTS["sparse_attention"]
    base, cost = costing.decode_ledger(c, 4096), contract.cost
    monkeypatch.setattr(contract, "cost", lambda *a, **k: replace(cost(*a, **k), matmul_flops=3 * cost(*a, **k).matmul_flops))
    assert costing.decode_ledger(c, 4096).flops("raw", "core") == 3 * base.flops("raw", "core")


@pytest.mark.parametrize(("name", "per_byte"), [("flash", 4096), ("pro", 6144)])
def test_communication(name: str, per_byte: float) -> None:
    found = report(name)["communication"]
    assert found["flop_per_byte"] == per_byte == 2 * named_config(name).moe_intermediate_size


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("flash", 69187, 284.33), ("pro", 145116, 1572.99)])
def test_weights(name: str, tensors: int, parameters: float) -> None:
    r = report(name)
    specs = checkpoint_tensors(named_config(name))
    assert len(specs) == tensors
    assert r["parameters"] / 1e9 == pytest.approx(parameters, abs=0.01)
    assert r["weight_bytes"] == sum(s.bytes for s in specs) == sum(r["weight_bytes_per_rank"])


def test_ranks_share_the_experts() -> None:
    config = named_config("flash")
    whole, shared = report("flash"), plan.report("flash", 4096, ranks=8)
    assert len(shared["weight_bytes_per_rank"]) == 8
    experts = sum(t.bytes for t in checkpoint_tensors(config) if ".experts." in t.name)
    assert max(shared["weight_bytes_per_rank"]) < whole["weight_bytes"] - experts * 7 // 8


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "tiny", "--context", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"cache_bytes_per_token", "cache_vs_v32", "flops_vs_v32", "weight_bytes", "ops", "communication"} <= set(found)
    assert {"raw", "equivalent_fp8"} <= set(found["flops_vs_v32"])
    assert {"linear", "head", "core", "index", "total"} == set(found["flops_per_token"]["raw"])


def test_text_shows_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "flash", "--context", str(MILLION)]) == 0
    out = capsys.readouterr().out
    for figure in ("3,514 B", "48,068 B", "7.3%", "284.33 B", "12.12%", "10.08%", "4,096 FLOP/B", "sparse_attention"):
        assert figure in out


def test_memory_that_does_not_suffice_fails(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "flash", "--context", str(MILLION), "--memory-gib"]
    assert main([*command, "64"]) == 1
    assert "needs 152." in capsys.readouterr().err
    assert main([*command, "160"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "flsh", "--context", "4096"], "did you mean 'flash'?"),
        (["--config", "v32", "--context", "4096"], "is neither a name in configs/"),
        (["--config", "flash", "--context", "1048577"], "expected 1 to max_position_embeddings = 1048576"),
        (["--config", "flash", "--context", "0"], "expected 1 to max_position_embeddings"),
        (["--config", "flash", "--context", "4096", "--ranks", "7"], "7 ranks"),
        (["--config", "nowhere.json", "--context", "4096"], "nowhere.json: not found"),
    ],
)
def test_wrong_plans_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
