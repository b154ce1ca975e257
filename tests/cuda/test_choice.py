"""The choice of the k largest scores by itself: every number of levels, ties, rows of which little is visible, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.cuda_triton import choice
from tests.cuda import choice_times
from tools.bench.cuda_clock import Clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PITCH = 1024


def rows(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, PITCH, generator=g)
    made = {
        "normal": x,
        "whole numbers": x.round(),
        "two values": (x > 1).float(),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "negative": -x.abs() - 1,
        "one outlier": torch.where(torch.arange(PITCH) == 700, 1e30, 1e-30 * x),
        "rising": torch.arange(PITCH).float().expand(6, -1),
        "falling": -torch.arange(PITCH).float().expand(6, -1),
        # all of the largest in few groups
        "clustered": torch.where(torch.arange(PITCH) // 32 % 8 == 3, x + 100, x),
        "infinite": torch.where(x > 2, torch.inf, torch.where(x < -1, -torch.inf, x)),
    }
    return made[kind].contiguous()


def expected(score: Tensor, seen: list[int], topk: int) -> Tensor:
    index = torch.full((len(seen), topk), -1, dtype=torch.int32)
    for t, n in enumerate(seen):
        best = score[t, :n].sort(descending=True, stable=True).indices[:topk].sort().values
        index[t, : len(best)] = best.int()
    return index


def chosen(score: Tensor, first_seen: int, topk: int, ratio: int = 1, columns: int | None = None) -> Tensor:
    index = torch.full((score.shape[0], topk), 77, dtype=torch.int32, device=DEVICE)
    cu = torch.tensor([0, score.shape[0]], dtype=torch.int32, device=DEVICE)
    start = torch.tensor([first_seen - 1], dtype=torch.int32, device=DEVICE)
    choice.choose(index, score.to(DEVICE), cu, start, 0, ratio, columns)
    return index.cpu()


KINDS = (
    "normal", "whole numbers", "two values", "zeros of both signs", "negative", "one outlier", "rising", "falling", "clustered", "infinite",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("whole", "group", "topk", "count"), [(1024, 8, 40, 1), (256, 8, 24, 2), (64, 4, 16, 3), (16, 2, 5, 7)])
def test_the_same_as_a_stable_sort(
    monkeypatch: pytest.MonkeyPatch, kind: str, whole: int, group: int, topk: int, count: int
) -> None:
    """0, 1, 2 and 6 levels of peaks, the last of which takes two launches of them."""
    plan = choice.Sizes(whole, group, 512)
    monkeypatch.setattr(choice, "sizes", lambda *counts: plan)
    monkeypatch.setattr(choice, "_READ", 256)
    score = rows(kind)
    assert len(choice.levels(PITCH, plan)) == count
    seen = [PITCH - 10 + t for t in range(6)]
    assert torch.equal(chosen(score, seen[0], topk), expected(score, seen, topk))


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("first", [0, 1, 5, 63, 64, 250])
def test_what_is_not_visible_is_not_chosen(monkeypatch: pytest.MonkeyPatch, first: int, few: int) -> None:
    monkeypatch.setattr(choice, "sizes", lambda *counts: choice.Sizes(64, 8, 512))
    monkeypatch.setattr(choice, "_READ", 128)
    monkeypatch.setattr(choice, "_FEW", few)
    score = rows("whole numbers")
    seen = [first + t for t in range(6)]
    for t, n in enumerate(seen):
        score[t, n:] = torch.nan if t % 2 else torch.inf
    assert torch.equal(chosen(score, first, 8), expected(score, seen, 8))
    columns = max(first, 1)
    assert torch.equal(chosen(score, first, 8, columns=columns), expected(score, [min(n, columns) for n in seen], 8))


@pytest.mark.parametrize("topk", [1, 512, 4096])
def test_the_built_in_sizes(topk: int) -> None:
    g = torch.Generator().manual_seed(1)
    score = torch.randn(2, 20000, generator=g).round(decimals=2)
    assert len(choice.levels(20000, choice.sizes(2, topk))) > 1
    assert torch.equal(chosen(score, 19990, topk), expected(score, [19990, 19991], topk))


def test_rows_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 1000\).*multiple of 16"):
        chosen(rows("normal")[:, :1000].contiguous(), 900, 4)


def test_the_comparison_with_topk_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device(DEVICE), 2)
    found = choice_times.measure(clock, 2, 1600)
    assert found["times_as_fast"] == pytest.approx(found["topk_us"] / found["us"])
    plain = choice.choose
    monkeypatch.setattr(choice, "choose", lambda index, *rest: (plain(index, *rest), index[:, :1].add_(1)))
    with pytest.raises(ValueError, match="2 x 1600: other values"):
        choice_times.measure(clock, 2, 1600)
