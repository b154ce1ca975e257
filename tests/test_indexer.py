"""Index choice: visibility, ties, sentinels, placement of blocks, chunking, and the certificate that judges choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import backends.cpu  # noqa: F401  registers the implementation under test
from backends.cpu import indexer as cpu_indexer
from ops import indexer
from ops.choice import topk_complaint
from ops.contract import Sample
from ops.indexer import index_scores_reference, index_topk
from ops.judge import judge

CPU = index_topk.impls["cpu"].fn
RUNS = [pytest.param(index_topk.reference, id="reference"), pytest.param(CPU, id="cpu")]
Run = Callable[..., Tensor]


def call(lengths: list[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Sample:
    args, kwargs = indexer._sample(dtype, torch.Generator().manual_seed(seed), lengths, **options)
    return Sample("made", args, kwargs)


def run(sample: Sample, fn: Run = CPU) -> Tensor:
    return fn(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("fn", RUNS)
def test_an_entry_is_visible_from_the_token_that_completes_it(fn: Run) -> None:
    counts = (run(call([(0, 12)], topk=5), fn) >= 0).sum(1).tolist()
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("fn", RUNS)
def test_few_visible_entries_are_all_chosen_and_minus_one_follows(fn: Run) -> None:
    index = run(call([(0, 33), (4, 1)], topk=6), fn)
    for t, p in enumerate([*range(33), 4]):
        visible = (p + 1) // 4
        if visible <= 6:
            assert index[t].tolist() == [*range(visible), *[-1] * (6 - visible)]


@pytest.mark.parametrize("fn", RUNS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_equal_scores_go_to_the_lowest_index(fn: Run, tokens: int) -> None:
    index = run(call([(100, tokens)], values="zero", topk=5), fn)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * tokens


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_partial_ties_go_to_the_lowest_index(tokens: int) -> None:
    sample = call([(200, tokens)], values="integer", heads=2, d=4, topk=9)
    verdict = judge(index_topk, CPU, sample)
    assert verdict.ok, str(verdict)
    assert torch.equal(run(sample), run(sample, index_topk.reference))

    def highest_index(*args: Any, **kwargs: Any) -> Tensor:
        scores, _ = index_scores_reference(*args, ratio=kwargs["ratio"], compute=torch.float64)
        best = scores.flip(1).sort(dim=1, descending=True, stable=True).indices[:, : kwargs["topk"]]
        return (scores.shape[1] - 1 - best).int()

    assert not judge(index_topk, highest_index, sample).ok


def test_heads_are_rectified_before_they_are_weighted() -> None:
    # two heads that cancel without the rectifier: head 0 likes entry 0, head 1 dislikes it
    sample = call([(8, 1)], heads=2, d=2, topk=1)
    _, _, cache, table, cu, start = sample.args
    cache[table[0, 0], :2] = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    q, w = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[1.0, 1.0]])
    assert CPU(q, w, cache, table, cu, start, ratio=4, topk=1).tolist() == [[0]]
    assert CPU(q, -w, cache, table, cu, start, ratio=4, topk=1).tolist() == [[1]]


def test_any_placement_of_blocks_gives_the_same_choice() -> None:
    for layout in ("plain", "index8", "index4"):
        ordered, shuffled = (call([(150, n) for n in (1, 3, 12)], ordered=o, d=32, layout=layout) for o in (True, False))
        q, w, cache, table, cu, start = ordered.args
        order = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(cache.shape[0] - 1) + 1))
        moved = torch.full_like(cache, 7)
        moved[order] = cache
        assert torch.equal(CPU(q, w, moved, order[table.long()].int(), cu, start, **ordered.kwargs), run(ordered))
        assert judge(index_topk, CPU, shuffled).ok


@pytest.mark.parametrize("layout", ["plain", "index8"])
def test_block_numbers_beyond_int32_offsets(layout: str) -> None:
    """Blocks whose first element lies behind 2**31; only the pages written are ever in memory."""
    sample = call([(150, 9), (80, 1)], layout=layout, block_rows=64, dtype=torch.bfloat16, d=128)
    q, w, cache, table, *rest = sample.args
    shift = 2**31 // (64 * cache.shape[2]) + 1
    far = torch.empty(shift + cache.shape[0], *cache.shape[1:], dtype=cache.dtype)
    far[shift:] = cache
    assert torch.equal(CPU(q, w, far, table + shift, *rest, **sample.kwargs), run(sample))


def test_blocks_may_lie_apart_in_memory() -> None:
    sample = call([(150, 9), (80, 1)])
    q, w, cache, *rest = sample.args
    wide = torch.zeros(cache.shape[0] * 2, *cache.shape[1:])
    wide[::2] = cache
    assert torch.equal(CPU(q, w, wide[::2], *rest, **sample.kwargs), run(sample))


def test_a_chunk_equals_its_queries_one_by_one() -> None:
    n = 50
    sample = call([(13, n)], values="integer", topk=5)
    q, w, cache, table, _, _ = sample.args
    one, parts = torch.tensor([0, 1], dtype=torch.int32), []
    for t in range(n):
        start = torch.tensor([13 + t], dtype=torch.int32)
        parts.append(CPU(q[t : t + 1], w[t : t + 1], cache, table, one, start, **sample.kwargs))
    assert torch.equal(torch.cat(parts), run(sample))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_keys_in_several_chunks(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_indexer, "_CHUNK", 1024)
    monkeypatch.setattr(cpu_indexer, "_SHARED_KEYS", 0)
    sample = call([(2900, tokens)], heads=4, d=32, topk=40, block_rows=16, dtype=dtype)
    verdict = judge(index_topk, CPU, sample)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_sample_is_chosen_correctly(seed: int, dtype: torch.dtype) -> None:
    for sample in index_topk.samples(dtype, seed):
        verdict = judge(index_topk, CPU, sample)
        assert verdict.ok, str(verdict)
        if "ties" in sample.tags:
            assert torch.equal(run(sample), run(sample, index_topk.reference)), sample.name


def test_nan_scores_give_a_list_of_distinct_visible_entries() -> None:
    sample = call([(100, 10)], topk=4)
    sample.args[0][3] = float("nan")
    index = run(sample)
    assert all(len(set(row)) == 4 and min(row) >= 0 for row in index.tolist())


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ([0, 2], None),
        ([2, 0], None),
        ([0, 0], "has entry 0 twice"),
        ([0, 4], "has entry 4, which is not visible"),
        ([0, -1], "has 1 entries, expected 2"),
        ([1, 2], r"entry 1 \(score 1 .* was chosen, entry 0 \(score 3"),
    ],
)
def test_certificate(index: list[int], complaint: str | None) -> None:
    scores, errors = torch.tensor([[3.0, 1.0, 2.0, 1.5]]), torch.full((1, 4), 0.1)
    found = topk_complaint(torch.tensor([index]), scores, errors, [4], False)
    if complaint is None:
        assert found is None
    else:
        assert found is not None and re.search(complaint, found)


def test_certificate_accepts_either_of_two_near_ties_and_rejects_sentinels_in_front() -> None:
    scores, errors = torch.tensor([[1.0, 1.01, 5.0]]), torch.full((1, 3), 0.01)
    for chosen in ([2, 0], [2, 1]):
        assert topk_complaint(torch.tensor([chosen]), scores, errors, [3], False) is None
    assert topk_complaint(torch.tensor([[2, 0]]), scores, errors, [3], True) is not None
    assert "-1 in front" in str(topk_complaint(torch.tensor([[-1, 0]]), scores, errors, [1], False))


def test_a_future_entry_is_rejected() -> None:
    sample = call([(60, 9)], topk=4)

    def leaking(*args: Any, **kwargs: Any) -> Tensor:
        index = CPU(*args, **kwargs)
        index[0, 0] = 16  # completed by the token at position 67, the query sits at 60
        return index

    assert not judge(index_topk, leaking, sample).ok


def test_cost_counts_visible_pairs() -> None:
    sample = call([(6, 3), (0, 1)], heads=2, d=32)
    cost = index_topk.cost(*sample.args, **sample.kwargs)
    assert cost.matmul_flops == 2 * 2 * 32 * (1 + 2 + 2 + 0) and cost.rate == "bf16"
    fp4 = replace(sample, args=(*sample.args[:2], torch.zeros(9, 4, 17, dtype=torch.uint8), *sample.args[3:]))
    assert index_topk.cost(*fp4.args, **fp4.kwargs).rate == "fp4"
