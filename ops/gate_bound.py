"""Judging expert choices: error of fp32 gate scores, and the certificate that a list of experts is a correct choice.

Shapes: x [T, D], weight [E, D], scores [T, E], ids and weights [T, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import bounds

_EXACT = 2**24  # integers below are exact in fp32, whatever the order of a sum


def score_bound(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact logits and scores [T, E] in float64 and the error an fp32 evaluation of the scores may have.

    The logit errs by the bound of a sum of D products; the score is monotone in it, so its error is that of the interval's
    ends, plus a few roundings of softplus and sqrt.
    """
    x, w = x_TD.double(), weight_ED.double()
    logits, error = x @ w.T, bounds.accumulate(x.shape[1], x.abs() @ w.abs().T)
    score = torch.nn.functional.softplus(logits).sqrt()
    low = torch.nn.functional.softplus(logits - error).sqrt()
    high = torch.nn.functional.softplus(logits + error).sqrt()
    return logits, score, torch.maximum(high - score, score - low) + bounds.SPREAD * 2 * bounds.roundoff(torch.float32) * score


def weights_bound(score_TE: Tensor, error_TE: Tensor, ids_TK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact routing weights [T, K] of the given experts and the error that score errors and fp32 roundings allow."""
    s, e = score_TE.gather(1, ids_TK.long()), error_TE.gather(1, ids_TK.long())
    total, slack = s.sum(-1, keepdim=True), e.sum(-1, keepdim=True)
    least = (total - slack).clamp_min(torch.finfo(torch.float32).tiny)
    weights = s / total * scale
    return weights, (e / least + s * slack / least.square()) * scale + bounds.SPREAD * 2 * bounds.roundoff(
        torch.float32
    ) * weights


def exact_ties(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, logits_TE: Tensor) -> Tensor:
    """Group number [T, E] of experts whose logit and bias are equal and whose logit fp32 gets exactly in any order; else -1."""
    x, w = x_TD.double(), weight_ED.double()
    integers = torch.equal(x, x.round()) and torch.equal(w, w.round())
    groups = torch.full(logits_TE.shape, -1, dtype=torch.int64)
    if not integers or not logits_TE.numel() or float((x.abs() @ w.abs().T).max()) >= _EXACT:
        return groups
    for t in range(len(groups)):
        groups[t] = torch.unique(torch.stack([logits_TE[t], bias_E.double()]), dim=1, return_inverse=True)[1]
    return groups


def choice_complaint(ids_TK: Tensor, value_TE: Tensor, error_TE: Tensor, groups_TE: Tensor) -> str | None:
    """Why `ids_TK` is no correct list of the largest values in descending order, or None.

    Every chosen expert must be in range and distinct, no expert left out may beat a chosen one, and no later one an
    earlier one, by more than the two errors together. Inside a group of exact ties (groups_TE >= 0) lower indices come first.
    """
    experts = value_TE.shape[1]
    if not ids_TK.numel():
        return None
    ids = ids_TK.long()
    if int(ids.min()) < 0 or int(ids.max()) >= experts:
        return f"ids reach from {int(ids.min())} to {int(ids.max())}, expected 0..{experts - 1}"
    ordered = ids.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return f"token {int((ordered[:, 1:] == ordered[:, :-1]).any(-1).nonzero()[0])} has the same expert twice"
    v, e, g = value_TE.gather(1, ids), error_TE.gather(1, ids), groups_TE.gather(1, ids)
    # (better, worse) pairs that would be wrong: an expert left out, or a later one of the list, against a chosen one
    left_TE = torch.ones_like(value_TE, dtype=torch.bool).scatter(1, ids, False)
    over_TKE = (value_TE - error_TE)[:, None] > (v + e)[:, :, None]
    index_E = torch.arange(experts)
    tie_TKE = (groups_TE[:, None] == g[:, :, None]) & (g >= 0)[:, :, None] & (index_E < ids[:, :, None])
    rank = torch.full_like(value_TE, -1, dtype=torch.int64).scatter(1, ids, torch.arange(ids.shape[1]).expand_as(ids))
    later_TKE = left_TE[:, None] | (rank[:, None] > torch.arange(ids.shape[1])[:, None])
    wrong = (over_TKE | tie_TKE) & later_TKE
    if not bool(wrong.any()):
        return None
    t, k, better = (int(i) for i in wrong.nonzero()[0])
    kind = "ties with a lower index" if bool(tie_TKE[t, k, better]) else "is larger"
    return (
        f"token {t}, place {k}: found expert {int(ids[t, k])} (value {float(v[t, k]):.9g}), but expert {better} "
        f"(value {float(value_TE[t, better]):.9g}) {kind} and is {'left out' if left_TE[t, better] else 'placed later'}"
    )
