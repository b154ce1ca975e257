"""Core attention: window, sink, visibility, sentinels, placement of blocks, independence of how a prompt is cut into calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import backends.cpu  # noqa: F401  registers the implementations under test
from backends.cpu import attention as cpu_attention
from ops.attention import sparse_attention
from ops.attention_samples import make
from ops.contract import Sample
from ops.judge import judge

CPU = sparse_attention.impls["cpu"].fn
RUNS = [pytest.param(sparse_attention.reference, id="reference"), pytest.param(CPU, id="cpu")]
Run = Callable[..., Tensor]


def call(lengths: list[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Sample:
    args, kwargs = make(dtype, torch.Generator().manual_seed(seed), lengths, **options)
    return Sample("made", args, kwargs)


def run(sample: Sample, fn: Run = CPU) -> Tensor:
    return fn(*sample.args, **sample.kwargs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def unit_rows(count: int, channels: int) -> Tensor:
    return torch.eye(channels)[:count]


def one_hot_call(position: int, window: int, channels: int = 160, **kwargs: Any) -> Sample:
    """One query of zeros at `position`; row p of the window is the unit vector p, so the output lists their weights."""
    cache = torch.zeros(2, channels, channels)
    cache[1] = unit_rows(channels, channels)
    table, cu = torch.tensor([[1]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    args = (torch.zeros(1, 1, channels), cache, table, torch.full((1,), -100.0), cu, torch.tensor([position], dtype=torch.int32))
    return Sample("one-hot", args, {"scale": 1.0, "window": window, **kwargs})


@pytest.mark.parametrize("fn", RUNS)
@pytest.mark.parametrize("position", [0, 126, 127, 128, 150])
def test_window_is_128_tokens_including_the_query(fn: Run, position: int) -> None:
    weights = run(one_hot_call(position, 128), fn)[0, 0]
    seen = weights.nonzero()[:, 0].tolist()
    assert seen == list(range(max(0, position - 127), position + 1))
    close(weights[seen], torch.full((len(seen),), 1 / len(seen)))


@pytest.mark.parametrize("fn", RUNS)
def test_sink_enters_the_denominator_only_and_is_not_scaled(fn: Run) -> None:
    sample = one_hot_call(3, 128)
    q, cache, table, _, cu, start = sample.args
    sink = torch.tensor([1.7])
    for scale in (1.0, 0.01):
        weights = fn(q, cache, table, sink, cu, start, scale=scale, window=128)[0, 0]
        close(weights[:4], torch.full((4,), 1 / (4 + float(sink.exp()))))
        assert not weights[4:].any()


@pytest.mark.parametrize("fn", RUNS)
@pytest.mark.parametrize(("position", "entries"), [(2, 0), (3, 1), (4, 1), (6, 1), (7, 2), (8, 2)])
def test_an_entry_is_visible_from_the_token_that_completes_it(fn: Run, position: int, entries: int) -> None:
    cmp_cache = torch.zeros(2, 4, 160)
    cmp_cache[1, :, 100:104] = torch.eye(4)
    sample = one_hot_call(position, 128, cmp_cache=cmp_cache, cmp_table=torch.tensor([[1]], dtype=torch.int32), ratio=4)
    assert run(sample, fn)[0, 0, 100:].nonzero()[:, 0].tolist() == list(range(entries))


@pytest.mark.parametrize("fn", RUNS)
def test_every_query_has_its_own_choice(fn: Run) -> None:
    sample = call([(40, 5)], ratio=4, topk=3)
    other = sample.kwargs["cmp_index"].clone()
    other[2] = torch.tensor([7, 8, 9], dtype=torch.int32)
    a, b = run(sample, fn), run(replace(sample, kwargs={**sample.kwargs, "cmp_index": other}), fn)
    changed = (a != b).any(-1).any(-1).tolist()
    assert changed[2] and not any(changed[:2] + changed[3:])


@pytest.mark.parametrize("long", [False, True], ids=["dense", "gathered"])
def test_later_rows_do_not_reach_earlier_queries(long: bool) -> None:
    start = 900 if long else 20
    kinds: list[dict[str, Any]] = [{}, {"ratio": 4, "topk": 5}, {"ratio": 4}]
    for options in kinds:
        sample = call([(start, 8)], channels=16, ordered=True, **options)
        before = run(sample)
        pools = [(sample.args[1], sample.args[2], start + 7)]
        if options:
            pools.append((sample.kwargs["cmp_cache"], sample.kwargs["cmp_table"], (start + 8) // 4 - 1))
        for cache, table, last in pools:
            cache[table[0, last // cache.shape[1]], last % cache.shape[1]] = 50.0
        after = run(sample)
        assert torch.equal(before[:7], after[:7]) and not torch.equal(before[7], after[7])


@pytest.mark.parametrize("lengths", [[(30, 6)], [(30, 1)], [(900, 6)], [(900, 1)]], ids=str)
def test_minus_one_contributes_nothing(lengths: list[tuple[int, int]]) -> None:
    sample = call(lengths, ratio=4, topk=5, channels=16)
    index = sample.kwargs["cmp_index"].clone()
    index[:, 3:] = -1
    a = run(replace(sample, kwargs={**sample.kwargs, "cmp_index": index}))
    b = run(replace(sample, kwargs={**sample.kwargs, "cmp_index": index[:, :3].contiguous()}))
    front = run(replace(sample, kwargs={**sample.kwargs, "cmp_index": index.flip(1).contiguous()}))
    close(a, b)
    close(a, front)
    none = run(replace(sample, kwargs={**sample.kwargs, "cmp_index": torch.full_like(index, -1)}))
    close(none, CPU(*sample.args, scale=sample.kwargs["scale"], window=sample.kwargs["window"]))


def moved(cache: Tensor, table: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with block b stored in block order[b]; block 0 stays."""
    result = torch.full_like(cache, 7)
    result[order] = cache
    return result, order[table.long()].int()


@pytest.mark.parametrize("options", [{}, {"ratio": 4, "topk": 6}, {"ratio": 8}, {"ratio": 4, "topk": 6, "packed": True}], ids=str)
def test_any_placement_of_blocks_gives_the_same_result(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"channels": 80, "rope_dim": 16} if "packed" in options else {}
    sample = call([(90, 4), (0, 33)], ordered=True, **options, **sizes)
    expected = run(sample)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        q, cache, table, *rest = sample.args
        kwargs = dict(sample.kwargs)

        def shuffled(c: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return moved(c, t, torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(c.shape[0] - 1, generator=g) + 1)))

        cache, table = shuffled(cache, table)
        if "cmp_cache" in kwargs:
            kwargs["cmp_cache"], kwargs["cmp_table"] = shuffled(kwargs["cmp_cache"], kwargs["cmp_table"])
        close(CPU(q, cache, table, *rest, **kwargs), expected)


def test_block_numbers_beyond_int32_offsets() -> None:
    """Blocks whose first element lies behind 2**31; only the pages written are ever in memory."""
    sample = call([(50, 7)], ratio=4, topk=3, channels=64, block_rows=32, dtype=torch.bfloat16, ordered=True)
    q, cache, table, *rest = sample.args
    shift = 2**31 // (32 * 64)
    far = torch.empty(shift + cache.shape[0], *cache.shape[1:], dtype=cache.dtype)
    far[shift:] = cache
    assert torch.equal(CPU(q, far, table + shift, *rest, **sample.kwargs), run(sample))
    del far
    entries, kwargs = sample.kwargs["cmp_cache"], dict(sample.kwargs)
    shift = 2**31 // (entries.shape[1] * 64) + 1
    kwargs["cmp_cache"] = torch.empty(shift + entries.shape[0], *entries.shape[1:], dtype=entries.dtype)
    kwargs["cmp_cache"][shift:] = entries
    kwargs["cmp_table"] = kwargs["cmp_table"] + shift
    assert torch.equal(CPU(q, cache, table, *rest, **kwargs), run(sample))


def test_blocks_may_lie_apart_in_memory() -> None:
    sample = call([(50, 7)], ratio=4, topk=3)
    q, cache, *rest = sample.args
    wide = torch.zeros(cache.shape[0] * 2, *cache.shape[1:])
    wide[::2] = cache
    kwargs = dict(sample.kwargs)
    entries = torch.zeros(kwargs["cmp_cache"].shape[0] * 3, *kwargs["cmp_cache"].shape[1:])
    entries[::3] = kwargs["cmp_cache"]
    kwargs["cmp_cache"] = entries[::3]
    close(CPU(q, wide[::2], *rest, **kwargs), run(sample))


@pytest.mark.parametrize("options", [{}, {"ratio": 4, "topk": 6}, {"ratio": 8}], ids=str)
@pytest.mark.parametrize("start", [0, 5, 900])
def test_a_chunk_equals_its_queries_one_by_one(options: dict[str, Any], start: int) -> None:
    n = 70
    sample = call([(start, n)], channels=16, **options)
    q, cache, table, sink, _, _ = sample.args
    whole = run(sample)
    for pieces in ([1] * n, [3, 4, 2, 33, 28]):
        at, parts = 0, []
        for size in pieces:
            kwargs = dict(sample.kwargs)
            if "cmp_index" in kwargs:
                kwargs["cmp_index"] = kwargs["cmp_index"][at : at + size]
            cu, pos = torch.tensor([0, size], dtype=torch.int32), torch.tensor([start + at], dtype=torch.int32)
            parts.append(CPU(q[at : at + size], cache, table, sink, cu, pos, **kwargs))
            at += size
        close(torch.cat(parts), whole)


def test_a_batch_equals_its_sequences() -> None:
    lengths = [(0, 3), (9, 0), (61, 1), (17, 20), (400, 2)]
    sample = call(lengths, ratio=4, topk=4)
    q, cache, table, sink, cu, start = sample.args
    whole, parts = run(sample), []
    for b, (low, high) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        kwargs = {**sample.kwargs, "cmp_table": sample.kwargs["cmp_table"][b : b + 1]}
        kwargs["cmp_index"] = kwargs["cmp_index"][low:high]
        single = torch.tensor([0, high - low], dtype=torch.int32)
        parts.append(CPU(q[low:high], cache, table[b : b + 1], sink, single, start[b : b + 1], **kwargs))
    close(torch.cat(parts), whole)


@pytest.mark.parametrize("gather", [False, True])
def test_both_ways_of_choosing_rows_agree_with_the_golden(gather: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "gathers", lambda *sizes: gather)
    for dtype in (torch.float32, torch.bfloat16):
        for sparse in (False, True):
            sample = call([(0, 40), (333, 9), (70, 1)], ratio=4, topk=6, dtype=dtype, sparse_index=sparse)
            verdict = judge(sparse_attention, CPU, sample)
            assert verdict.ok, str(verdict)


def test_blocks_of_queries_follow_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[dict[str, Any]] = [{}, {"ratio": 4, "topk": 6}, {"ratio": 8}]
    samples = [call([(100, 50)], heads=4, **options) for options in kinds]
    expected = [run(s) for s in samples]
    monkeypatch.setattr(cpu_attention, "_SCORES", 200)
    monkeypatch.setattr(cpu_attention, "_COPIED", 300)
    for sample, wanted in zip(samples, expected, strict=True):
        close(run(sample), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_sample_lies_within_the_bound(seed: int, dtype: torch.dtype) -> None:
    for sample in sparse_attention.samples(dtype, seed):
        verdict = judge(sparse_attention, CPU, sample)
        assert verdict.ok, str(verdict)


def mutants() -> dict[str, Run]:
    def change(**how: Any) -> Run:
        def fn(q: Tensor, wc: Tensor, wt: Tensor, sink: Tensor, cu: Tensor, start: Tensor, **kw: Any) -> Tensor:
            kw = {**kw, "window": kw["window"] + how.get("window", 0), "scale": kw["scale"] * how.get("scale", 1.0)}
            sink = sink * how.get("sink", 1.0)
            if "index" in how and kw.get("cmp_index") is not None:
                kw["cmp_index"] = kw["cmp_index"][:1].expand_as(kw["cmp_index"]).contiguous()
            return CPU(q, wc, wt, sink, cu, start, **kw)

        return fn

    return {
        "window-127": change(window=-1),
        "no-sink": change(sink=-1e9),
        "scaled-sink": change(sink=0.2),
        "scale": change(scale=1.01),
        "shared-choice": change(index=True),
    }


@pytest.mark.parametrize("name", sorted(mutants()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bound_rejects_wrong_variants(name: str, dtype: torch.dtype) -> None:
    sample = call([(60, 12)], ratio=4, topk=4, dtype=dtype, q_scale=3.0)
    sink = sample.args[3].abs() + 1
    sample = replace(sample, args=(*sample.args[:3], sink, *sample.args[4:]))
    assert judge(sparse_attention, CPU, sample).ok
    assert not judge(sparse_attention, mutants()[name], sample).ok


def test_cost_counts_rows_of_every_query() -> None:
    sample = call([(10, 3), (0, 2)], heads=2, channels=16, window=8, ratio=4, topk=2)
    rows = [8 + 2, 8 + 2, 8 + 2 + 1 - 1, 1, 2]  # windows plus min(2, (p + 1) // 4) entries
    assert sparse_attention.cost(*sample.args, **sample.kwargs).matmul_flops == 4 * 2 * 16 * sum(rows)
