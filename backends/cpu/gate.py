"""Expert gates: fp32 logits, stable sorting so that equal values go to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu.linear import matmul_nt
from ops.gate import gate_hash, gate_topk

_SMALL = 1 << 17  # weight elements below which, for one token, starting oneDNN costs more than the product


def _scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    product = torch.nn.functional.linear if x_TD.shape[0] == 1 and weight_ED.numel() <= _SMALL else matmul_nt
    return torch.nn.functional.softplus(product(x_TD.float(), weight_ED.float())).sqrt_()


def _weights(scores_TE: Tensor, ids_TK: Tensor, scale: float) -> Tensor:
    chosen_TK = scores_TE.gather(1, ids_TK)
    return chosen_TK.div_(chosen_TK.sum(-1, keepdim=True)).mul_(scale)


@gate_topk.implement("cpu")
def _gate_topk(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    scores_TE = _scores(x_TD, weight_ED)
    ids_TK = torch.sort(scores_TE + bias_E, dim=-1, descending=True, stable=True).indices[:, :topk].contiguous()
    return _weights(scores_TE, ids_TK, scale), ids_TK.to(torch.int32)


@gate_hash.implement("cpu")
def _gate_hash(
    x_TD: Tensor, weight_ED: Tensor, tid2eid_VK: Tensor, token_ids_T: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    ids_TK = tid2eid_VK[token_ids_T.long()]
    return _weights(_scores(x_TD, weight_ED), ids_TK.long(), scale), ids_TK.to(torch.int32)
