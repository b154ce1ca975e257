"""Models of expert parallel dispatch and combine: ranks as threads, against a loop over tokens; and re-routing behind an all-to-all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.ascend.model_checks import near, poisoned
from tools.npu_standin import models
from tools.npu_standin.models import dispatch

pytestmark = pytest.mark.standin

MODELS = models.load()
RANKS, EXPERTS, TOKENS, K, WIDTH = 4, 16, 5, 6, 64
GROUP = "communicator"


def _inputs() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(TOKENS, WIDTH, generator=g).bfloat16(),
            "expert_ids": torch.stack([torch.randperm(EXPERTS, generator=g)[:K] for _ in range(TOKENS)]).int(),
            "weights": torch.rand(TOKENS, K, generator=g),
        }
        for _ in range(RANKS)
    ]


def _on_all(run: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(RANKS) as pool:
        return [f.result() for f in [pool.submit(run, rank) for rank in range(RANKS)]]


def _dispatch(given: dict[str, torch.Tensor], rank: int, **changes: Any) -> Any:
    passed = {"x": given["x"], "expert_ids": given["expert_ids"], "group_ep": GROUP, "ep_world_size": RANKS, "ep_rank_id": rank}
    return MODELS["npu::npu_moe_distribute_dispatch_v2"](**{**passed, "moe_expert_num": EXPERTS, **changes})


def _combine(given: dict[str, torch.Tensor], rank: int, rows: torch.Tensor, sent: Any, **changes: Any) -> torch.Tensor:
    passed = {"expand_x": rows, "expert_ids": given["expert_ids"], "assist_info_for_combine": sent[2], "ep_send_counts": sent[4]}
    passed |= {
        "expert_scales": given["weights"],
        "group_ep": GROUP,
        "ep_world_size": RANKS,
        "ep_rank_id": rank,
        "moe_expert_num": EXPERTS,
    }
    return MODELS["npu::npu_moe_distribute_combine_v2"](**{**passed, **changes})


def _expert(rows: torch.Tensor, e: int) -> torch.Tensor:
    return rows.float() * (e + 1)


def test_dispatch_experts_combine():
    inputs = _inputs()

    def rank_of(rank: int) -> tuple[Any, torch.Tensor]:
        sent = _dispatch(inputs[rank], rank)
        rows, counts = sent[0].clone(), sent[3]
        start = 0
        for local, n in enumerate(counts.tolist()):
            rows[start : start + n] = _expert(rows[start : start + n], rank * 4 + local).bfloat16()
            start += n
        assert poisoned(sent[0][start:])
        assert sent[0].shape[0] == RANKS * TOKENS * 4
        return sent, _combine(inputs[rank], rank, rows, sent)

    for given, (_, y) in zip(inputs, _on_all(rank_of), strict=True):
        expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
        for t in range(TOKENS):
            for j in range(K):
                expected[t] += (
                    given["weights"][t, j].double() * _expert(given["x"][t], int(given["expert_ids"][t, j])).bfloat16().double()
                )
        near(y, expected, 2)


def test_dispatch_counts_and_int8():
    inputs = _inputs()
    everywhere = torch.stack([torch.bincount(i["expert_ids"].flatten(), minlength=EXPERTS) for i in inputs]).sum(0)
    for rank, sent in enumerate(_on_all(lambda r: _dispatch(inputs[r], r, quant_mode=2))):
        assert torch.equal(sent[3], everywhere[rank * 4 : rank * 4 + 4])
        assert sent[0].dtype == torch.int8
        used = int(sent[3].sum())
        assert torch.equal(sent[0][:used].abs().amax(1), torch.full((used,), 127, dtype=torch.int8))
        assert poisoned(sent[1][used:])
    assert torch.equal(_on_all(lambda r: _dispatch(inputs[r], r, expert_token_nums_type=0))[0][3], everywhere[:4].cumsum(0))


def test_inactive_tokens_are_not_sent_and_come_back_undefined():
    inputs = _inputs()
    mask = torch.tensor([True, True, False, False, False])

    def rank_of(rank: int) -> torch.Tensor:
        sent = _dispatch(inputs[rank], rank, x_active_mask=mask)
        assert int(sent[3].sum()) <= RANKS * 2 * K
        return _combine(inputs[rank], rank, sent[0], sent, x_active_mask=mask)

    for given, y in zip(inputs, _on_all(rank_of), strict=True):
        near(y[:2], given["weights"][:2].double().sum(1, keepdim=True) * given["x"][:2].double(), 3)
        assert poisoned(y[2:])


def test_the_shared_expert_is_added():
    inputs, shared = _inputs(), torch.ones(TOKENS, WIDTH).bfloat16()

    def rank_of(rank: int) -> torch.Tensor:
        sent = _dispatch(inputs[rank], rank)
        return _combine(inputs[rank], rank, sent[0], sent, shared_expert_x=shared)

    given, y = inputs[0], _on_all(rank_of)[0]
    near(y, given["weights"].double().sum(1, keepdim=True) * given["x"].double() + 1, 3)


def test_a_rank_that_stays_away_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "PATIENCE", 0.2)
    with pytest.raises(models.Refused, match="not all of 4 ranks"):
        _dispatch(_inputs()[0], 0, group_ep="lonely")


@pytest.mark.wheel
@pytest.mark.parametrize("changes", [{}, {"quant_mode": 2}])
def test_outputs_are_those_of_the_wheels_meta(changes, soc):
    given = _inputs()[0]
    found = _on_all(lambda r: _dispatch(_inputs()[r], r, **changes))[0]
    meta = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        given["x"].to("meta"), given["expert_ids"].to("meta"), GROUP, RANKS, 0, EXPERTS, **changes
    )
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in meta]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"ep_world_size": 1}, "ep_world_size 1"),
        ({"group_ep": ""}, "communicator"),
        ({"moe_expert_num": 18}, "moe_expert_num 18"),
        ({"quant_mode": 1}, "quant_mode 1"),
        ({"expert_ids": torch.zeros(TOKENS, K).int()}, "an expert twice"),
        ({"expert_ids": torch.zeros(TOKENS, K).long()}, "expert_ids torch.int64"),
        ({"x_active_mask": torch.tensor([False, True, True, True, True])}, "trues first"),
        ({"x": torch.zeros(513, WIDTH).bfloat16(), "expert_ids": torch.arange(6).expand(513, 6).int()}, "BS = 513"),
        ({"comm_alg": "hierarchy"}, "comm_alg"),
        ({"expert_scales": torch.ones(TOKENS, K)}, "only on A2"),
    ],
)
def test_dispatch_limits(change, message):
    with pytest.raises(models.Refused, match=message):
        _dispatch(_inputs()[0], 0, **change)


def test_limits_of_a2(on_chip):
    on_chip("910b")
    for change, message in (
        ({"ep_world_size": 12, "moe_expert_num": 24}, "ep_world_size 12"),
        ({"x": torch.zeros(257, WIDTH).bfloat16(), "expert_ids": torch.arange(6).expand(257, 6).int()}, "BS = 257"),
        ({"x": torch.zeros(TOKENS, 7200).bfloat16()}, "H = 7200"),
    ):
        with pytest.raises(models.Refused, match=message):
            _dispatch(_inputs()[0], 0, **change)


def test_re_routing_puts_experts_together():
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]])
    rows = torch.arange(10).float()[:, None].expand(10, 8).bfloat16()
    found, scales, index, total = MODELS["npu::npu_moe_re_routing"](rows, counts, per_token_scales=torch.arange(10).float())
    assert index[:7].tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert torch.equal(found[:7], rows[index[:7].long()])
    assert scales[:7].tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert total.tolist() == [3, 3, 1]
    assert poisoned(found[7:])
    assert poisoned(MODELS["npu::npu_moe_re_routing"](rows, counts)[1])
