"""The batch-invariant backend: every bit of a token's result is the same in any company and at any place.

That each of its ops is right is judged with all other backends in test_contracts. Here each op runs on a batch, on its rows in
another order and on every row alone; paged ops also with other sequences around, other physical blocks and other chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import cpu_invariant
from backends.cpu_invariant.rows import DELEGATED, EXPERTS, ROWS
from ops.contract import CONTRACTS, Sample
from ops.paged import paged, row_slots
from ops.registry import bind, signature

PAGED = ("sparse_attention", "index_topk", "compress")
DTYPES = (torch.float32, torch.bfloat16)
Op = Callable[..., Any]


def op_of(name: str) -> Op:
    return CONTRACTS[name].impls["cpu_invariant"].fn


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(-1).view(torch.uint8).tolist() if x.numel() else []


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def taken(result: Any, rows: Tensor) -> Any:
    return result[rows] if isinstance(result, Tensor) else tuple(part[rows] for part in result)


def test_every_op_is_served_by_this_backend_alone() -> None:
    # what is composed of parts that do not see other tokens does not either
    composed = {name for name, contract in CONTRACTS.items() if contract.compose and "cpu_invariant" not in contract.impls}
    covered = {*ROWS, *EXPERTS, *DELEGATED, *PAGED, "moe_combine", *composed}
    assert covered == set(CONTRACTS)
    for dtype in DTYPES:
        binding = bind(("cpu_invariant",), dtype=dtype)
        assert all(choice.used == ("cpu_invariant",) for choice in binding.choices)
    assert cpu_invariant.DEVICE.type == cpu_invariant.probe().device == "cpu"


def test_signatures_are_those_of_the_contracts() -> None:
    for name, contract in CONTRACTS.items():
        if (impl := contract.impls.get("cpu_invariant")) is None:
            assert contract.compose, name
            continue
        assert [*signature(contract).parameters] == [*impl.fn.__signature__.parameters], name  # type: ignore[attr-defined]


# ---- ops with a row per token ------------------------------------------------------------------------------------------------


def differences(fn: Op, sample: Sample, op: str, names: tuple[str, ...]) -> list[str]:
    """Which rearrangements of the sample's rows change a row's bits."""
    bound = signature(CONTRACTS[op]).bind(*sample.args, **sample.kwargs)
    rows = {n: bound.arguments[n] for n in names if isinstance(bound.arguments.get(n), Tensor)}
    count = next(iter(rows.values())).shape[0]

    def run(order: Tensor) -> Any:
        bound.arguments.update({name: value[order] for name, value in rows.items()})
        return fn(*bound.args, **bound.kwargs)

    everyone = torch.arange(count)
    full = run(everyone)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    found = [] if same(run(shuffled), taken(full, shuffled)) else ["other order"]
    found += [] if same(run(everyone[1:]), taken(full, everyone[1:])) else ["first row left out"]
    found += [
        f"row {t} alone" for t in range(min(count, 6)) if not same(run(everyone[t : t + 1]), taken(full, everyone[t : t + 1]))
    ]
    return found


def batches(op: str, dtype: torch.dtype) -> list[Sample]:
    samples = [s for s in CONTRACTS[op].samples(dtype, 11) if s.args[0].dim() > 1 and s.args[0].shape[0] > 1]
    assert samples, f"{op} has no sample with two rows"
    return samples[:6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(ROWS))
def test_rows_do_not_depend_on_their_batch(op: str, dtype: torch.dtype) -> None:
    for sample in batches(op, dtype):
        found = differences(op_of(op), sample, op, ROWS[op])
        assert not found, f"{op}[{sample.name}]: bits change with {', '.join(found)}"


def test_a_dependence_on_the_batch_is_seen() -> None:
    def centred(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return CONTRACTS["rms_norm"].reference(x, weight, eps=eps) + 1e-7 * x.shape[0]

    sample = next(s for s in batches("rms_norm", torch.float32) if s.name.startswith("odd"))
    assert differences(centred, sample, "rms_norm", ("x",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_products_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(33, 1003, generator=g).to(dtype), torch.randn(257, 1003, generator=g).to(dtype)
    assert not differences(op_of("linear"), Sample("wide", (x, w)), "linear", ("x",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(EXPERTS))
def test_expert_rows_do_not_depend_on_their_neighbours(op: str, dtype: torch.dtype) -> None:
    for sample in CONTRACTS[op].samples(dtype, 11):
        rows, row_weight, counts, *weights = sample.args
        full = op_of(op)(*sample.args, **sample.kwargs)
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts).tolist()
        for a in range(min(len(owner), 8)):
            one = torch.zeros_like(counts)
            one[owner[a]] = 1
            alone = op_of(op)(rows[a : a + 1], row_weight[a : a + 1], one, *weights, **sample.kwargs)
            assert same(alone, full[a : a + 1]), f"{op}[{sample.name}] row {a}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combined_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    for sample in CONTRACTS["moe_combine"].samples(dtype, 11):
        rows, index = sample.args
        tokens, topk = sample.kwargs["tokens"], sample.kwargs["topk"]
        full = op_of("moe_combine")(rows, index, tokens=tokens, topk=topk)
        for t in range(min(tokens, 6)):
            mine = (index // topk == t).nonzero()[:, 0].flip(0)  # rows may also lie in another order
            alone = op_of("moe_combine")(rows[mine], index[mine] - t * topk, tokens=1, topk=topk)
            assert same(alone, full[t : t + 1]), f"token {t} of {sample.name}"


# ---- ops over paged caches ---------------------------------------------------------------------------------------------------

START, COUNT = (0, 37, 5), (9, 6, 0)  # three sequences: a fresh one, a continued one, one without tokens
RATIO, WINDOW, BLOCK, CHANNELS, HEADS = 4, 7, 8, 40, 3


def lengths(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def histories(g: torch.Generator, divisor: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn((s + n) // divisor, width, generator=g).to(dtype) for s, n in zip(START, COUNT, strict=True)]


def assert_rows_are_independent(run: Callable[[int, int, int, int], Tensor], full: Tensor) -> None:
    """`run(layout, sequence, first, end)` on parts of single sequences, under other block layouts, gives rows of `full`."""
    cu = lengths(COUNT).tolist()
    for b, count in enumerate(COUNT):
        for layout in (0, 1):
            for cut in {0, 1, count // 2} if count else ():
                for first, end in ((0, cut), (cut, count)):
                    if first < end:
                        part = run(layout, b, first, end)
                        assert same(part, full[cu[b] + first : cu[b] + end]), (
                            f"sequence {b}, tokens {first}..{end}, layout {layout}"
                        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["window", "all entries", "chosen entries", "packed"])
def test_attention_depends_on_rows_only(kind: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    q = torch.randn(sum(COUNT), HEADS, 128 if kind == "packed" else CHANNELS, generator=g).to(dtype)
    near, far = histories(g, 1, q.shape[2], dtype), histories(g, RATIO, q.shape[2], dtype)
    sink, layout = torch.randn(HEADS, generator=g), "fp8" if kind == "packed" else "plain"
    index = torch.full((sum(COUNT), 4), -1, dtype=torch.int32)
    for t, p in enumerate(p for s, n in zip(START, COUNT, strict=True) for p in range(s, s + n)):
        chosen = torch.randperm((p + 1) // RATIO, generator=g)[:4].sort().values
        index[t, : len(chosen)] = chosen.int()
    caches = []
    for seed in (0, 1):
        place = torch.Generator().manual_seed(seed)
        caches.append((*paged(near, BLOCK, place, layout=layout), *paged(far, BLOCK, place, layout=layout, ordered=seed == 1)))

    def run(layout: int, sequences: slice, tokens: slice, counts: tuple[int, ...], starts: tuple[int, ...]) -> Tensor:
        window, window_table, entries, entry_table = caches[layout]
        kwargs: dict[str, Any] = {"scale": 0.2, "window": WINDOW}
        if kind != "window":
            kwargs.update(cmp_cache=entries, cmp_table=entry_table[sequences], ratio=RATIO)
        if kind in ("chosen entries", "packed"):
            kwargs["cmp_index"] = index[tokens]
        start = torch.tensor(starts, dtype=torch.int32)
        return op_of("sparse_attention")(q[tokens], window, window_table[sequences], sink, lengths(counts), start, **kwargs)

    full = run(0, slice(None), slice(None), COUNT, START)
    cu = lengths(COUNT).tolist()
    assert_rows_are_independent(
        lambda layout, b, first, end: run(
            layout, slice(b, b + 1), slice(cu[b] + first, cu[b] + end), (end - first,), (START[b] + first,)
        ),
        full,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "index8", "index4"])
def test_index_depends_on_rows_only(layout: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    q, w = torch.randn(sum(COUNT), HEADS, 128, generator=g).to(dtype), torch.randn(sum(COUNT), HEADS, generator=g)
    keys = histories(g, RATIO, 128, dtype)
    caches = [paged(keys, BLOCK, torch.Generator().manual_seed(s), layout=layout, ordered=s == 1) for s in (0, 1)]

    def run(layout: int, sequences: slice, tokens: slice, counts: tuple[int, ...], starts: tuple[int, ...]) -> Tensor:
        cache, table = caches[layout]
        start = torch.tensor(starts, dtype=torch.int32)
        return op_of("index_topk")(q[tokens], w[tokens], cache, table[sequences], lengths(counts), start, ratio=RATIO, topk=3)

    full = run(0, slice(None), slice(None), COUNT, START)
    cu = lengths(COUNT).tolist()
    assert_rows_are_independent(
        lambda layout, b, first, end: run(
            layout, slice(b, b + 1), slice(cu[b] + first, cu[b] + end), (end - first,), (START[b] + first,)
        ),
        full,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overlap", [True, False])
def test_compressor_depends_on_rows_only(overlap: bool, dtype: torch.dtype) -> None:
    """One call over three sequences, sequences alone, and chunks: equal entries and equal states, wherever the state lies."""
    g = torch.Generator().manual_seed(5)
    c, hidden, counts = 10, 33, (13, 18, 0)
    w = 2 * c if overlap else c
    x = torch.randn(sum(counts), hidden, generator=g).to(dtype)
    weights = (torch.randn(w, hidden, generator=g).to(dtype), torch.randn(w, hidden, generator=g).to(dtype))
    fixed = (*weights, torch.randn(RATIO, w, generator=g), 1 + torch.rand(c, generator=g).to(dtype))
    angle = torch.randn(64, 3, generator=g)
    before = [torch.randn(s + n, 2 * w, generator=g) for s, n in zip(START, counts, strict=True)]
    cu = lengths(counts).tolist()

    def entries(start: int, end: int) -> Tensor:
        return torch.arange(start // RATIO, end // RATIO)

    def run(seed: int, parts: list[tuple[int, int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """One call per (sequence, first, end) of `parts`; sequence -1: all in one call. Entries and states by sequence."""
        state, table = paged(before, BLOCK, torch.Generator().manual_seed(seed))
        made: list[list[Tensor]] = [[] for _ in counts]
        for b, first, end in parts:
            chosen = range(len(counts)) if b < 0 else range(b, b + 1)
            spans = [(START[i] + first, START[i] + (counts[i] if b < 0 else end)) for i in chosen]
            e = torch.cat([entries(*span) for span in spans])
            rows = x if b < 0 else x[cu[b] + first : cu[b] + end]
            start = torch.tensor([s for s, _ in spans], dtype=torch.int32)
            offsets = lengths(tuple(high - low for low, high in spans))
            call = (state, table[list(chosen)], offsets, start)
            y = op_of("compress")(rows, *fixed, angle[e].cos(), angle[e].sin(), *call, ratio=RATIO, eps=1e-6)
            for i, part in zip(chosen, y.split([len(entries(*span)) for span in spans]), strict=True):
                made[i].append(part)
        flat = state.view(-1, 2 * w)
        states = [flat[row_slots(table[i], torch.arange(len(rows)), BLOCK)] for i, rows in enumerate(before)]
        return [torch.cat(parts) if parts else x.new_zeros(0, c) for parts in made], states

    together = run(0, [(-1, 0, 0)])
    assert sum(map(len, together[0])) > 5
    for parts in ([(0, 0, 13), (1, 0, 18)], [(1, 0, 1), (1, 1, 7), (0, 0, 5), (0, 5, 13), (1, 7, 18)]):
        for found, golden in zip(run(1, parts), together, strict=True):
            assert all(same(a, b) for a, b in zip(found, golden, strict=True)), f"parts {parts}"


def test_compressor_needs_no_stored_rows_of_the_call_itself() -> None:
    """Tokens whose state is not kept (table entry 0) still reach the entries of their own call."""
    g = torch.Generator().manual_seed(6)
    c, w, x = 6, 12, torch.randn(19, 20, generator=g)
    fixed = (torch.randn(w, 20, generator=g), torch.randn(w, 20, generator=g), torch.randn(RATIO, w, generator=g), torch.ones(c))
    angle = torch.randn(4, 2, generator=g)
    results, states = [], []
    for blocks in ([1, 2, 3], [0, 0, 3]):
        state, table = torch.zeros(4, BLOCK, 2 * w), torch.tensor([blocks], dtype=torch.int32)
        call = (state, table, lengths((19,)), torch.zeros(1, dtype=torch.int32))
        results.append(op_of("compress")(x, *fixed, angle.cos(), angle.sin(), *call, ratio=RATIO, eps=1e-6))
        states.append(state)
    assert same(results[0], results[1])
    assert same(states[0][3], states[1][3]) and not states[1][:3].any()
