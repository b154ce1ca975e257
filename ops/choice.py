"""Judging choices of the k largest: the certificate that a list of indices is a correct one, given scores and their errors.

Shapes: index [T, k], score and error [T, N], visible: per query the number of entries 0..visible-1 it may choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _list_complaint(chosen: list[int], visible: int) -> str | None:
    """Form of one query's list: min(k, visible) distinct visible entries, then -1."""
    expected = min(len(chosen), visible)
    real = [i for i in chosen if i != -1]
    if len(real) != expected:
        return f"has {len(real)} entries, expected {expected} ({visible} are visible)"
    if any(i == -1 for i in chosen[:expected]):
        return "has -1 in front of an entry, expected -1 at the end only"
    if len(set(real)) != len(real):
        return f"has entry {next(i for i in real if real.count(i) > 1)} twice"
    if wrong := [i for i in real if not 0 <= i < visible]:
        return f"has entry {wrong[0]}, which is not visible (0..{visible - 1} are)"
    return None


def topk_complaint(index_Tk: Tensor, score_TN: Tensor, error_TN: Tensor, visible: Sequence[int], exact: bool) -> str | None:
    """Why `index_Tk` is no correct choice of the largest scores, or None.

    Every list holds min(k, visible) distinct visible entries, then -1; the order is free. An entry left out must not beat a
    chosen one by more than the errors of both. exact: scores carry no error, so ties must go to the lowest index and the set is
    unique.
    """
    for t, (chosen, v) in enumerate(zip(index_Tk.tolist(), visible, strict=True)):
        if complaint := _list_complaint(chosen, v):
            return f"query {t}: the list {complaint}"
        count = min(len(chosen), v)
        if count == v:
            continue
        score, error = score_TN[t, :v].double(), error_TN[t, :v].double()
        inside = torch.zeros(v, dtype=torch.bool)
        inside[torch.tensor(chosen[:count], dtype=torch.int64)] = True
        if exact:
            best = score.sort(descending=True, stable=True).indices[:count]
            if bool(inside[best].all()):
                continue
            missing = int(best[~inside[best]][0])
            spare = next(i for i in chosen[:count] if i not in set(best.tolist()))
            return (
                f"query {t}: found entry {spare} (score {float(score[spare]):.9g}), expected entry {missing} "
                f"(score {float(score[missing]):.9g}); scores are exact and ties go to the lowest index"
            )
        infinity = torch.full_like(score, float("inf"))
        worst = torch.where(inside, score + error, infinity)
        left = torch.where(inside, -infinity, score - error)
        low, high = int(worst.argmin()), int(left.argmax())
        if left[high] > worst[low]:
            return (
                f"query {t}: entry {low} (score {float(score[low]):.9g} +- {float(error[low]):.2g}) was chosen, "
                f"entry {high} (score {float(score[high]):.9g} +- {float(error[high]):.2g}) was left out"
            )
    return None
