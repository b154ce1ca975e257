"""The certificate of choices against its own statement, pair by pair in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.choice import complaint, topk_complaint


def stated(chosen: list[int], value: list[float], error: list[float], ties: list[int], visible: int, ordered: bool) -> bool:
    """Whether one query's list is correct."""
    count = min(len(chosen), visible)
    real, rest = chosen[:count], chosen[count:]
    if set(rest) - {-1} or len(set(real)) != count or not all(0 <= i < visible for i in real):
        return False
    for place, item in enumerate(real):
        for other in range(visible):
            if other in (real[: place + 1] if ordered else real):
                continue
            if value[other] - error[other] > value[item] + error[item]:
                return False
            if ties[item] >= 0 and ties[item] == ties[other] and other < item:
                return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[float], list[float], list[int], int]:
    n = draw(st.integers(1, 6))
    k = draw(st.integers(1, 5))
    value = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("-inf"), float("nan")]), min_size=n, max_size=n))
    error = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=n, max_size=n))
    ties = draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n))
    visible = draw(st.integers(0, n))
    some = st.lists(st.integers(-3, n), min_size=k, max_size=k)
    right = st.permutations(range(visible)).map(lambda p: [*p, *[-1] * k][:k])
    return draw(st.one_of(some, right)), value, error, ties, visible


@pytest.mark.parametrize("ordered", [False, True])
@given(rows=st.lists(cases(), min_size=1, max_size=1), other=st.booleans())
def test_vectorised_equals_stated(
    rows: list[tuple[list[int], list[float], list[float], list[int], int]], other: bool, ordered: bool
) -> None:
    chosen, value, error, ties, visible = rows[0]
    expected = stated(chosen, value, error, ties, visible, ordered)
    n, k = len(value), len(chosen)
    lists, values, errors, groups, seen = [chosen], [value], [error], [ties], [visible]
    if other:  # a correct query in front must not change the verdict
        lists.insert(0, [*range(min(n, k)), *[-1] * max(k - n, 0)])
        values.insert(0, [-float(i) for i in range(n)])
        errors.insert(0, [0.0] * n)
        groups.insert(0, [-1] * n)
        seen.insert(0, n)
    found = complaint(
        torch.tensor(lists), torch.tensor(values), torch.tensor(errors), torch.tensor(groups), seen, ordered=ordered
    )
    assert (found is None) == expected, found
    if found is not None:
        assert found.startswith(f"query {int(other)}")


def test_an_undefined_value_hides_no_other_pair() -> None:
    value, error = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]), torch.zeros(1, 4)
    assert topk_complaint(torch.tensor([[0, 1]]), value, error, [4], False) is not None
    assert topk_complaint(torch.tensor([[0, 3]]), value, error, [4], False) is None


def test_exact_sets_are_unique() -> None:
    value, error = torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.ones(1, 4)
    lists = {
        (i, j) for i in range(4) for j in range(4) if topk_complaint(torch.tensor([[i, j]]), value, error, [4], True) is None
    }
    assert lists == {(0, 1), (1, 0)}


def test_many_queries_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.randn(512, 2048, generator=g)
    best = value.topk(64, dim=1).indices
    error, ties = torch.full_like(value, 1e-7), torch.full(value.shape, -1)
    assert complaint(best, value, error, ties, ordered=True) is None
    best[300, 7] = value[300].argmin()
    assert "query 300, place 7" in (complaint(best, value, error, ties) or "")
