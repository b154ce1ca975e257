"""Collectives through torch.distributed; a copy for one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ops.comm import Group, all_gather, all_reduce, all_to_all, ranks


@all_reduce.implement("cpu")
def _all_reduce(x: Tensor, *, group: Group = None) -> Tensor:
    if group is None:
        return x.clone()
    y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    dist.all_reduce(y, group=group)
    return y.to(x.dtype)


@all_gather.implement("cpu")
def _all_gather(x: Tensor, *, group: Group = None) -> Tensor:
    if group is None:
        return x.clone()
    y = x.new_empty((ranks(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather(list(y.chunk(ranks(group))) if len(y) else [y] * ranks(group), x.contiguous(), group=group)
    return y


@all_to_all.implement("cpu")
def _all_to_all(x: Tensor, send_counts: Tensor, recv_counts: Tensor, *, group: Group = None) -> Tensor:
    if group is None:
        return x.clone()
    send, receive = send_counts.tolist(), recv_counts.tolist()
    y = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
    return y
