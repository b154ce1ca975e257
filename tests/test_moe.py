"""Mixture of experts: the specification's check values, choices judged by margin, wrong variants that the judge rejects."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import cpu  # noqa: F401  - registers the implementations
from ops.contract import CONTRACTS, Contract, Sample
from ops.gate_bound import choice_complaint
from ops.judge import judge
from ops.registry import bind

GATE, HASH, SWIGLU = (CONTRACTS[n] for n in ("gate_topk", "gate_hash", "clamped_swiglu"))
DISPATCH, COMBINE, MLP = (CONTRACTS[n] for n in ("moe_dispatch", "moe_combine", "moe_mlp"))
EXPERTS, EXPERTS_FP4, EXPERTS_FP8 = (CONTRACTS[n] for n in ("grouped_experts", "grouped_experts_fp4", "grouped_experts_fp8"))


def forms(contract: Contract) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return contract.reference, contract.impls["cpu"].fn


def rejected(contract: Contract, fn: Callable[..., Any], dtype: torch.dtype = torch.float32) -> set[str]:
    return {s.name for s in contract.samples(dtype, 7) if not judge(contract, fn, s).ok}


# ---- gates -------------------------------------------------------------------------------------------------------------------


def test_scores_have_the_check_values_of_the_specification() -> None:
    # two experts per token, one of them with a known score s(0): the ratio of the weights gives the other's
    for fn in forms(GATE):
        for logit, score in ((-5.0, 0.0819472), (1.0, 1.1459763), (5.0, 2.2375691), (25.0, 5.0), (100.0, 10.0)):
            weights, ids = fn(torch.ones(1, 1), torch.tensor([[0.0], [logit]]), torch.tensor([1e3, 0.0]), topk=2, scale=1.0)
            assert ids.tolist() == [[0, 1]]
            assert float(weights[0, 1] / weights[0, 0]) * 0.8325546 == pytest.approx(score, rel=8e-7)


def test_bias_selects_but_does_not_weigh() -> None:
    x, w = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [5.0]])
    for fn in forms(GATE):
        weights, ids = fn(x, w, torch.tensor([10.0, 5.0, 0.0]), topk=2, scale=2.5)
        assert ids.tolist() == [[0, 1]]
        expected = 2.5 * torch.tensor([0.8325546, 1.1459763]) / (0.8325546 + 1.1459763)
        torch.testing.assert_close(weights[0], expected, rtol=1e-6, atol=0)


def test_hash_gate_takes_experts_from_the_table_and_weights_from_the_scores() -> None:
    table = torch.tensor([[2, 0], [1, 2]])
    for fn in forms(HASH):
        weights, ids = fn(torch.ones(2, 1), torch.tensor([[0.0], [1.0], [5.0]]), table, torch.tensor([1, 0]), scale=1.0)
        assert ids.tolist() == [[1, 2], [2, 0]]
        assert float(weights[1, 0] / weights[1, 1]) == pytest.approx(2.2375691 / 0.8325546, rel=3e-7)


def test_logits_are_computed_in_fp32_for_bf16_inputs() -> None:
    # in bf16 both logits would round to 256
    x, w = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[256.0, 0.0], [256.0, 0.5]], dtype=torch.bfloat16)
    assert GATE.impls["cpu"].fn(x, w, torch.zeros(2), topk=1, scale=1.0)[1].tolist() == [[1]]


def _gate_mutant(change: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def fn(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
        logits = x_TD.float() @ weight_ED.float().T
        score = logits.sigmoid() if change == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
        value = score if change == "no bias" else score + bias_E
        experts = value.shape[1]
        if change == "highest index":
            ids = experts - 1 - value.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        else:
            ids = value.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        if change == "ascending":
            ids = ids.flip(-1)
        if change == "duplicate":
            ids = ids.clone()
            ids[:, 1:2] = ids[:, :1]
        if change == "next best" and topk < experts:
            ids = value.sort(dim=-1, descending=True, stable=True).indices[:, 1 : topk + 1]
        weights = (value if change == "biased weights" else score).gather(1, ids)
        total = 1.0 if change == "not normalised" else weights.sum(-1, keepdim=True)
        return weights / total * (1.0 if change == "no scale" else scale), ids.int()

    return fn


MUTANTS = (
    "sigmoid",
    "no bias",
    "highest index",
    "ascending",
    "duplicate",
    "next best",
    "biased weights",
    "not normalised",
    "no scale",
)


def test_the_unchanged_gate_passes() -> None:
    assert not rejected(GATE, _gate_mutant("none"))


@pytest.mark.parametrize("change", MUTANTS)
def test_judge_rejects_wrong_gates(change: str) -> None:
    assert rejected(GATE, _gate_mutant(change)), f"every sample accepts {change}"


def test_only_tie_samples_fix_the_order_of_equal_values() -> None:
    assert {"ties", "ties-all"} <= rejected(GATE, _gate_mutant("highest index"))
    assert not rejected(GATE, _gate_mutant("highest index")) & {"odd", "many", "near-ties"}


def test_certificate_names_what_is_wrong() -> None:
    value = torch.tensor([[1.0, 3.0, 2.0, 2.0 + 1e-9]], dtype=torch.float64)
    error, free = torch.full_like(value, 1e-8), torch.full(value.shape, -1)
    assert choice_complaint(torch.tensor([[1, 2]]), value, error, free) is None  # 3 is better by less than the errors
    assert "left out" in (choice_complaint(torch.tensor([[1, 0]]), value, error, free) or "")
    assert "placed later" in (choice_complaint(torch.tensor([[2, 1]]), value, error, free) or "")
    assert "twice" in (choice_complaint(torch.tensor([[1, 1]]), value, error, free) or "")
    assert "expected 0..3" in (choice_complaint(torch.tensor([[1, 4]]), value, error, free) or "")
    tied = torch.tensor([[0, 1, 2, 2]])
    assert "ties with a lower index" in (choice_complaint(torch.tensor([[1, 3]]), value, error, tied) or "")


# ---- SwiGLU and experts ------------------------------------------------------------------------------------------------------


def test_clamp_is_asymmetric_and_before_silu() -> None:
    x = torch.tensor([[30.0, -30.0, 2.0, 3.0, 3.0, 20.0], [30.0, -30.0, 2.0, -30.0, 30.0, -20.0]])
    silu10, silu2 = 10 / (1 + torch.exp(torch.tensor(-10.0))), 2 / (1 + torch.exp(torch.tensor(-2.0)))
    for fn in forms(SWIGLU):
        y = fn(x, limit=10.0)
        torch.testing.assert_close(y[0, 0], silu10 * 3)
        torch.testing.assert_close(y[0, 2], silu2 * 10)
        torch.testing.assert_close(y[1, 0], silu10 * -10)
        # the gate has no lower clamp: silu(-30), not silu(-10)
        torch.testing.assert_close(y[0, 1], torch.tensor(-30.0).sigmoid() * -30 * 3)
        torch.testing.assert_close(fn(x, limit=10.0, row_weight=torch.tensor([0.5, 2.0]))[1], y[1] * 2)


def _swiglu_mutant(change: str) -> Callable[..., Tensor]:
    def fn(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
        gate, up = gate_up_T2I.float().chunk(2, -1)
        if change == "halves swapped":
            gate, up = up, gate
        low = -limit if change == "gate clamped below" else None
        if change != "no clamp":
            gate = gate if change == "clamp after" else gate.clamp(low, limit)
            up = up.clamp(max=limit) if change == "up free below" else up.clamp(-limit, limit)
        h = torch.nn.functional.silu(gate)
        h = (h.clamp(max=limit) if change == "clamp after" else h) * up
        h = h if row_weight is None or change == "no weight" else h * row_weight[:, None]
        return h.to(gate_up_T2I.dtype)

    return fn


@pytest.mark.parametrize(
    "change", ["halves swapped", "gate clamped below", "no clamp", "up free below", "clamp after", "no weight"]
)
def test_judge_rejects_wrong_swiglu(change: str) -> None:
    assert rejected(SWIGLU, _swiglu_mutant(change), torch.bfloat16), f"every sample accepts {change}"
    assert not rejected(SWIGLU, _swiglu_mutant("none"), torch.bfloat16)


@pytest.mark.parametrize("contract", [EXPERTS, EXPERTS_FP4, EXPERTS_FP8], ids=lambda c: c.name)
@pytest.mark.parametrize("change", ["next expert", "no weight", "no clamp", "halves swapped"])
def test_judge_rejects_wrong_experts(contract: Contract, change: str) -> None:
    def fn(rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, *weights: Tensor, **kwargs: Any) -> Tensor:
        if change == "next expert":
            counts_E = counts_E.roll(1)
        if change == "no weight":
            row_weight_A = torch.ones_like(row_weight_A)
        if change == "no clamp":
            kwargs["limit"] = 1e6
        if change == "halves swapped":
            bits = weights[0].view(torch.uint8) if weights[0].element_size() == 1 else weights[0]  # FP8 has no roll
            weights = (bits.roll(bits.shape[1] // 2, 1).view(weights[0].dtype), *weights[1:])
        return contract.impls["cpu"].fn(rows_AD, row_weight_A, counts_E, *weights, **kwargs)

    assert rejected(contract, fn), f"every sample accepts {change}"


@pytest.mark.parametrize("contract", [EXPERTS_FP4, EXPERTS_FP8], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_judge_sees_whether_activations_were_quantised(contract: Contract, dtype: torch.dtype) -> None:
    def other(*args: Tensor, limit: float, quantize: bool = True) -> Tensor:
        return contract.impls["cpu"].fn(*args, limit=limit, quantize=not quantize)

    found = rejected(contract, other, dtype)
    assert {"clamp", "clamp-plain"} <= found


def test_weight_is_applied_before_the_second_quantisation() -> None:
    """After w2 the weight would not move the FP8 codes of h; the samples tell the two apart."""

    def late(
        rows_AD: Tensor, row_weight_A: Tensor, counts_E: Tensor, *weights: Tensor, limit: float, quantize: bool = True
    ) -> Tensor:
        ones = torch.ones_like(row_weight_A)
        y = EXPERTS_FP4.impls["cpu"].fn(rows_AD.float(), ones, counts_E, *weights, limit=limit, quantize=quantize)
        return (y * row_weight_A[:, None]).to(rows_AD.dtype)

    found = rejected(EXPERTS_FP4, late)
    assert "clamp" in found and "clamp-plain" not in found


# ---- dispatch, combine, the whole -------------------------------------------------------------------------------------------


def test_dispatch_is_sorted_by_expert_and_stable() -> None:
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]], dtype=torch.int32)
    x, weights = torch.arange(3.0)[:, None], torch.arange(6.0).view(3, 2)
    for fn in forms(DISPATCH):
        rows, row_weight, counts, index = fn(x, ids, weights, num_experts=4)
        assert index.tolist() == [1, 2, 5, 0, 3, 4] and index.dtype == torch.int32
        assert counts.tolist() == [2, 1, 3, 0] and counts.dtype == torch.int64
        assert rows[:, 0].tolist() == [0, 1, 2, 0, 1, 2] and row_weight.tolist() == [1, 2, 5, 0, 3, 4]


@pytest.mark.parametrize("bad", [-1, 4])
def test_cpu_refuses_experts_that_do_not_exist(bad: int) -> None:
    ids = torch.tensor([[0, bad]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expert ids reach from -?\d to \d, expected 0\.\.3"):
        DISPATCH.impls["cpu"].fn(torch.zeros(1, 2), ids, torch.ones(1, 2), num_experts=4)


def test_combine_counts_absent_rows_as_zero() -> None:
    rows, index = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([5, 0, 4], dtype=torch.int32)
    for fn in forms(COMBINE):
        assert fn(rows, index, tokens=4, topk=2)[:, 0].tolist() == [10.0, 0.0, 101.0, 0.0]


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_mlp_equals_its_parts(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, w13, w2 = (torch.randn(*shape, generator=g) for shape in ((tokens, 24), (5, 32, 24), (5, 24, 16)))
    weights, ids = GATE.reference(x, torch.randn(5, 24, generator=g), torch.zeros(5), topk=3, scale=1.5)
    sample = Sample("parts", (x, ids, weights, w13, w2), {"limit": 10.0})
    assert MLP.compose is not None
    parts = bind(("cpu",), dtype=torch.float32, only=list(MLP.parts)).ops
    for fn in (MLP.compose(parts), MLP.impls["cpu"].fn):
        verdict = judge(MLP, fn, sample)
        assert verdict.ok, str(verdict)


def test_cost_counts_only_experts_with_rows() -> None:
    x, w13, w2 = torch.zeros(4, 8), torch.zeros(6, 10, 8), torch.zeros(6, 8, 5)
    cost = EXPERTS.cost(x, torch.ones(4), torch.tensor([0, 3, 0, 0, 1, 0]), w13, w2, limit=10.0)
    assert cost.matmul_flops == 2 * 4 * 3 * 5 * 8
    assert cost.bytes_read == 4 * 8 * 4 + 4 * 4 + 6 * 8 + 2 * 4 * (10 * 8 + 8 * 5)
    ids = torch.tensor([[1, 4], [1, 4]], dtype=torch.int32)
    mlp = MLP.cost(x[:2], ids, torch.ones(2, 2), w13, w2, limit=10.0)
    assert mlp.bytes_read == 2 * 8 * 4 + 4 * 4 + 4 * 4 + 2 * 4 * (10 * 8 + 8 * 5)


# ---- collectives -------------------------------------------------------------------------------------------------------------


def _rank(rank: int, path: str, size: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    group = dist.group.WORLD
    g = torch.Generator().manual_seed(rank)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(5, 3, generator=g).to(dtype)
            for op in ("all_reduce", "all_gather"):
                verdict = judge(CONTRACTS[op], CONTRACTS[op].impls["cpu"].fn, Sample(op, (x,), {"group": group}))
                assert verdict.ok, str(verdict)
            # rank r sends r + s + 1 rows to rank s, marked with both
            send, receive = torch.tensor([rank + s + 1 for s in range(size)]), torch.tensor([s + rank + 1 for s in range(size)])
            rows = torch.cat([torch.full((rank + s + 1, 2), 10.0 * rank + s) for s in range(size)]).to(dtype)
            contract = CONTRACTS["all_to_all"]
            verdict = judge(contract, contract.impls["cpu"].fn, Sample("all_to_all", (rows, send, receive), {"group": group}))
            assert verdict.ok, str(verdict)
            found = contract.impls["cpu"].fn(rows, send, receive, group=group)
            assert found[:, 0].tolist() == [10.0 * s + rank for s in range(size) for _ in range(s + rank + 1)]
    finally:
        dist.destroy_process_group()


def test_collectives_between_two_processes(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"), 2), nprocs=2)
