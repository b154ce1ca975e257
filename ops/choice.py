"""Judging choices of the largest: the certificate that lists of indices are correct ones, given values and their errors.

An item that is passed over must not beat one that was preferred by more than the errors of both, and among exact ties the lowest
index is preferred. In a set every item left out is passed over for every chosen one; in an ordered list a later item is also
passed over for an earlier one.

Shapes: chosen [T, K], value, error and ties [T, N] float64, float64 and int64; visible: per query the number of items
0..visible-1 it may choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INF = float("inf")


def _misshapen(chosen_TK: Tensor, visible_T: Tensor) -> tuple[int, str] | None:
    """The first query whose list is not min(K, visible) distinct visible items and then -1, and what is wrong with it."""
    k = chosen_TK.shape[1]
    expected_T = visible_T.clamp(max=k)
    real_TK = chosen_TK != -1
    front_TK = torch.arange(k) < expected_T[:, None]
    ordered_TK = torch.where(real_TK, chosen_TK, 2**62 + torch.arange(k)).sort(-1).values
    twice_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(-1)
    outside_TK = real_TK & ((chosen_TK < 0) | (chosen_TK >= visible_T[:, None]))
    wrong_T = (real_TK != front_TK).any(-1) | twice_T | outside_TK.any(-1)
    if not bool(wrong_T.any()):
        return None
    t = int(wrong_T.nonzero()[0])
    items, count, visible = chosen_TK[t][real_TK[t]].tolist(), int(expected_T[t]), int(visible_T[t])
    if len(items) != count:
        return t, f"the list has {len(items)} entries, expected {count} ({visible} are visible)"
    if bool((real_TK[t] != front_TK[t]).any()):
        return t, "the list has -1 in front of an entry, expected -1 at the end only"
    if bool(twice_T[t]):
        return t, f"the list has entry {next(i for i in items if items.count(i) > 1)} twice"
    return t, f"the list has entry {int(chosen_TK[t][outside_TK[t]][0])}, which is not visible (expected 0..{visible - 1})"


def _passed_over_T(
    chosen_TK: Tensor, value_TN: Tensor, error_TN: Tensor, ties_TN: Tensor, visible_T: Tensor, ordered: bool
) -> Tensor:
    """Per query whether some item was wrongly passed over; lists are well formed."""
    queries, n = value_TN.shape
    k = chosen_TK.shape[1]
    listed_TK, at_TK = chosen_TK >= 0, chosen_TK.clamp(min=0)
    # place in the order of preference: its position in an ordered list, 0 in a set, k for an item left out
    place_TN = torch.full((queries, n + 1), k)
    places_K = torch.arange(k) if ordered else torch.zeros(k, dtype=torch.int64)
    place_TN.scatter_(1, torch.where(listed_TK, at_TK, n), places_K.expand(queries, k))
    place_TN = place_TN[:, :n]
    visible_TN = torch.arange(n) < visible_T[:, None]
    # an undefined value convicts nobody
    most_TN, least_TN = (value_TN + error_TN).nan_to_num(_INF, _INF, -_INF), (value_TN - error_TN).nan_to_num(-_INF, _INF, -_INF)
    most_TK = torch.where(listed_TK, most_TN.gather(1, at_TK), _INF)
    lowest_TK = most_TK.cummin(1).values
    left_TN = torch.where(visible_TN & (place_TN == k), least_TN, -_INF)
    wrong_T = left_TN.amax(1) > lowest_TK[:, -1]
    if ordered:
        least_TK = torch.where(listed_TK, least_TN.gather(1, at_TK), -_INF)
        wrong_T |= (least_TK[:, 1:] > lowest_TK[:, :-1]).any(1)
    # in a group of ties, taken by ascending index, preference never rises
    group_TN, order_TN = torch.where(visible_TN, ties_TN, -1).sort(dim=1, stable=True)
    place_TN = place_TN.gather(1, order_TN)
    same_TN = (group_TN[:, 1:] == group_TN[:, :-1]) & (group_TN[:, 1:] >= 0)
    return wrong_T | (same_TN & (place_TN[:, 1:] < place_TN[:, :-1])).any(1)


def _pair(
    chosen_K: list[int], value_N: Tensor, error_N: Tensor, ties_N: Tensor, visible: int, ordered: bool
) -> tuple[int, int, bool]:
    """The first place of one query's list with an item that should have been preferred, and whether the two tie."""
    chosen = [i for i in chosen_K if i >= 0]
    for place, item in enumerate(chosen):
        over_N = value_N - error_N > value_N[item] + error_N[item]
        tied_N = (ties_N == ties_N[item]) & (ties_N[item] >= 0) & (torch.arange(len(ties_N)) < item)
        over_N[chosen[: place + 1] if ordered else chosen] = False
        tied_N[chosen[: place + 1] if ordered else chosen] = False
        over_N[visible:], tied_N[visible:] = False, False
        if bool((over_N | tied_N).any()):
            best = int(torch.where(over_N, value_N, -_INF).argmax()) if bool(over_N.any()) else int(tied_N.nonzero()[0])
            return place, best, not bool(over_N[best])
    raise AssertionError("no item was passed over in this query")


def complaint(
    chosen_TK: Tensor,
    value_TN: Tensor,
    error_TN: Tensor,
    ties_TN: Tensor,
    visible: Sequence[int] | None = None,
    *,
    ordered: bool = False,
) -> str | None:
    """Why `chosen_TK` is no correct choice of the K largest values, or None.

    Every list holds min(K, visible) distinct visible items (default: of all N), then -1. value and error float; ties int64: items
    of one query with the same number >= 0 are equal without any error. ordered: the list descends; otherwise its order is free.
    """
    queries, n = value_TN.shape
    if not chosen_TK.numel():
        return None
    chosen_TK = chosen_TK.long()
    visible_T = torch.full((queries,), n) if visible is None else torch.tensor(visible, dtype=torch.int64)
    if found := _misshapen(chosen_TK, visible_T):
        return f"query {found[0]}: {found[1]}"
    if not n:
        return None
    value_TN, error_TN = value_TN.double(), error_TN.double()
    wrong_T = _passed_over_T(chosen_TK, value_TN, error_TN, ties_TN, visible_T, ordered)
    if not bool(wrong_T.any()):
        return None
    t = int(wrong_T.nonzero()[0])
    row = chosen_TK[t].tolist()
    place, better, tied = _pair(row, value_TN[t], error_TN[t], ties_TN[t], int(visible_T[t]), ordered)

    def item(i: int) -> str:
        return f"entry {i} (score {float(value_TN[t, i]):.9g} +- {float(error_TN[t, i]):.2g})"

    why = "ties with a lower index" if tied else "is larger"
    where = "placed later" if better in row else "left out"
    return f"query {t}, place {place}: {item(row[place])} was chosen, {item(better)} was {where}, though it {why}"


def topk_complaint(index_Tk: Tensor, score_TN: Tensor, error_TN: Tensor, visible: Sequence[int], exact: bool) -> str | None:
    """Why the sets `index_Tk` are no correct choices of the largest scores, or None; see `complaint`.

    exact: scores carry no error, so ties must go to the lowest index and the set is unique.
    """
    if not exact:
        return complaint(index_Tk, score_TN, error_TN, torch.full(score_TN.shape, -1), visible)
    ties_TN = torch.unique(score_TN, return_inverse=True)[1].view(score_TN.shape)
    return complaint(index_Tk, score_TN, torch.zeros_like(error_TN), ties_TN, visible)
