"""Where two backends' runs over the same texts part: the first unlike token and the first unlike choice, each with its margins.

A correct choice may differ between backends only where the preferred values lie closer together than the two backends' values of
the same items lie apart. `near` says that they do; that each choice is right for its own values is the contract's part
(`tools/eval/following.py` judges every one).

Shapes: S steps, V vocabulary, T tokens of a call, N items, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.eval.drafts import first_difference


def token_difference(base: list[int], other: list[int], base_SV: Tensor, other_SV: Tensor) -> dict[str, Any] | None:
    """The first unlike token of two texts, None for equal ones.

    Logits are those of the base's text on both backends. margin: by how much the base prefers its token to the other's there.
    apart: how far the two backends' differences between any two logits lie apart at the other steps up to there (twice the largest
    error after the mean is taken out). near: margin <= apart. ValueError when the first token is unlike and no other step is known.
    """
    at = first_difference(base, other)
    if at is None:
        return None
    if not at < min(len(base), len(other)):
        raise ValueError(f"texts of {len(base)} and {len(other)} tokens: expected the same number")
    row_V = base_SV[at].double()
    margin = float(row_V[base[at]] - row_V[other[at]])
    difference_SV = (base_SV - other_SV).double()
    difference_SV -= difference_SV.mean(-1, keepdim=True)
    elsewhere = [s for s in range(at + 1) if s != at] or [s for s in range(len(base_SV)) if s != at]
    apart = 2 * float(difference_SV[elsewhere].abs().max()) if elsewhere else 0.0
    return {"token": at, "base": base[at], "other": other[at], "margin": margin, "apart": apart, "near": margin <= apart}


def _rows(choices: Sequence[dict[str, Any]], op: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(c["place"], c["step"]): c for c in choices if c["op"] == op}


def choice_differences(op: str, base: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists of `op` that differ between two runs over one text.

    rows: lists that had something to choose from; unlike: lists that are other sets; tied: lists of the base whose last chosen and
    first refused item are exactly equal; first: the first unlike list in the order of computation (`place`, `step`, `row`, `margin`,
    `apart`, `near`); near: unlike lists that are near ties. margin: largest amount by which the base prefers an item that only it chose to one
    that only the other chose; apart: twice the largest difference of the two runs' values of the items in question.
    ValueError when the runs did not make the same calls.
    """
    left, right = _rows(base, op), _rows(other, op)
    if left.keys() != right.keys():
        raise ValueError(f"{op}: {len(left)} and {len(right)} calls, or other places: the two runs did not follow the same text")
    rows = unlike = tied = near = 0
    first: dict[str, Any] | None = None
    for (place, step), a in left.items():
        b = right[place, step]
        for row, (mine_K, theirs_K) in enumerate(zip(a["chosen_TK"].tolist(), b["chosen_TK"].tolist(), strict=True)):
            mine, theirs = ({i for i in k if i >= 0} for k in (mine_K, theirs_K))
            own_N, their_N = a["score_TN"][row], b["score_TN"][row]
            seen = int(own_N.isfinite().sum())
            if seen <= len(mine):
                continue
            rows += 1
            ranked = own_N.sort(descending=True).values
            tied += bool(ranked[len(mine) - 1] == ranked[len(mine)])
            if mine == theirs:
                continue
            unlike += 1
            only, lost = sorted(mine - theirs), sorted(theirs - mine)
            margin = float(own_N[only].max() - own_N[lost].min())
            items = torch.tensor(only + lost)
            apart = 2 * float((own_N[items] - their_N[items]).abs().max())
            found = {"place": place, "step": step, "row": row, "margin": margin, "apart": apart, "near": margin <= apart}
            near += margin <= apart
            first = first or found
    return {"rows": rows, "unlike": unlike, "tied": tied, "near": near, "first": first}
