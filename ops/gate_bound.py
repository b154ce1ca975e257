"""Judging expert choices: error of fp32 gate scores, and the certificate that a list of experts is a correct choice.

Shapes: x [T, D], weight [E, D], scores [T, E], ids and weights [T, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import bounds
from ops.choice import complaint

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
    if not integers or not logits_TE.numel() or float((x.abs() @ w.abs().T).max()) >= _EXACT:
        return torch.full(logits_TE.shape, -1)
    logit_TE, bias_E = (torch.unique(v, return_inverse=True)[1] for v in (logits_TE, bias_E.double()))
    return logit_TE * bias_E.shape[0] + bias_E


def choice_complaint(ids_TK: Tensor, value_TE: Tensor, error_TE: Tensor, groups_TE: Tensor) -> str | None:
    """Why `ids_TK` is no correct list of the largest values in descending order, or None; see `ops.choice.complaint`.

    Inside a group of exact ties (groups_TE >= 0) lower indices come first.
    """
    return complaint(ids_TK, value_TE, error_TE, groups_TE, ordered=True)
