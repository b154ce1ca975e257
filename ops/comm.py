"""Collectives between ranks. `group=None` means one rank: every collective is then a copy.

Shapes: x [A, ...]; N ranks; counts int64 [N].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

Group: TypeAlias = "dist.ProcessGroup | None"

_SHAPES = {"zero": (0, 16), "one": (1, 16), "odd": (3, 7), "wide": (2, 3, 33), "flat": (5,)}


def ranks(group: Group) -> int:
    """Number of ranks of `group`, 1 for None. `group` is a torch.distributed process group."""
    return 1 if group is None else int(dist.get_world_size(group))


def _check_x(op: str, x: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError(f"{op}: x has no dimension, expected [A, ...]; add one with x[None]")


def _widened(x: Tensor, compute: torch.dtype) -> Tensor:
    return x.to(compute if x.is_floating_point() else x.dtype, copy=True)


def _check_counts(x: Tensor, name: str, counts: Tensor, size: int) -> None:
    if counts.shape != (size,) or counts.dtype != torch.int64:
        raise ValueError(
            f"all_to_all: {name} is {counts.dtype} {tuple(counts.shape)}, expected torch.int64 ({size},), "
            "one per rank of the group"
        )
    if name == "send_counts" and counts.device.type == "cpu" and int(counts.sum()) != x.shape[0]:
        raise ValueError(f"all_to_all: send_counts add up to {int(counts.sum())}, expected {x.shape[0]}, the rows of x")


# ---- all_reduce -----------------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, *, group: Group = None, compute: torch.dtype = torch.float32) -> Tensor:
    """Sum of x over the ranks of `group`; a copy for one rank (group None).

    x [A, ...], floating, the same shape on every rank. Returns x's shape and type. Backends may add
    in x's type. Source: specification section 10.6. ValueError for a zero-dimensional or non-floating x.
    """
    y = x.to(compute, copy=True)
    if group is not None:
        dist.all_reduce(y, group=group)
    return y


def _all_reduce_meta(x: Tensor, *, group: Group = None) -> Tensor:
    _check_x("all_reduce", x)
    if not x.is_floating_point():
        raise ValueError(f"all_reduce: x is {x.dtype}, expected a floating type")
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _all_reduce_bound(x: Tensor, *, group: Group = None, golden: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Any]:
    if group is None:
        return (None,)
    return (bounds.accumulate(ranks(group), _all_reduce(x.abs(), group=group, compute=torch.float64), x.dtype),)


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in _SHAPES.items():
        yield Sample(name, (torch.randn(shape, generator=g).to(dtype),), {}, (name,))


def _all_reduce_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("scalar", (torch.zeros((), dtype=dtype),), {}, "x has no dimension")
    yield WrongInput("integer", (torch.zeros(2, dtype=torch.int32),), {}, "x is torch.int32")


all_reduce = Contract(
    name="all_reduce",
    reference=_all_reduce,
    meta=_all_reduce_meta,
    samples=_samples,
    errors=_all_reduce_errors,
    bound=_all_reduce_bound,
    cost=lambda x, *, group=None: Cost(0, (ranks(group) - 1) * x.numel(), tensors_bytes(x), tensors_bytes(x), "fp32"),
)


# ---- all_gather -----------------------------------------------------------------------------------------------------


def _all_gather(x: Tensor, *, group: Group = None, compute: torch.dtype = torch.float32) -> Tensor:
    """Concatenation of every rank's x along dimension 0, rank after rank; a copy for one rank (group None).

    x [A, ...] of any type, the same shape on every rank. Returns [N*A, ...], bitwise copies.
    Source: specification section 10.6. ValueError for a zero-dimensional x.
    """
    x = _widened(x, compute)
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _all_gather_meta(x: Tensor, *, group: Group = None) -> Tensor:
    _check_x("all_gather", x)
    return torch.empty((ranks(group) * x.shape[0], *x.shape[1:]), dtype=x.dtype, device="meta")


all_gather = Contract(
    name="all_gather",
    reference=_all_gather,
    meta=_all_gather_meta,
    samples=_samples,
    errors=lambda dtype: iter([WrongInput("scalar", (torch.zeros((), dtype=dtype),), {}, "x has no dimension")]),
    bound=lambda x, *, group=None, golden, found: (None,),
    cost=lambda x, *, group=None: Cost(0, 0, tensors_bytes(x), ranks(group) * tensors_bytes(x), "fp32"),
)


# ---- all_to_all -----------------------------------------------------------------------------------------------------


def _all_to_all(
    x: Tensor, send_counts: Tensor, recv_counts: Tensor, *, group: Group = None, compute: torch.dtype = torch.float32
) -> Tensor:
    """Exchange of rows: the first send_counts[0] rows of x go to rank 0, the next send_counts[1] to rank 1, and so on.

    x [A, ...] of any type; send_counts and recv_counts int64 [N] on the CPU, recv_counts[r] = rows that rank r sends here.
    Returns [sum recv_counts, ...] ordered by sending rank, bitwise copies; one rank (group None): a copy of x.
    Source: specification section 12.3 (expert dispatch). ValueError for counts of another length or type or another sum than A.
    """
    x = _widened(x, compute)
    if group is None:
        return x
    send, receive = send_counts.tolist(), recv_counts.tolist()
    y = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
    return y


def _all_to_all_meta(x: Tensor, send_counts: Tensor, recv_counts: Tensor, *, group: Group = None) -> Tensor:
    _check_x("all_to_all", x)
    size = ranks(group)
    _check_counts(x, "send_counts", send_counts, size)
    _check_counts(x, "recv_counts", recv_counts, size)
    if group is None and int(recv_counts.sum()) != x.shape[0]:
        raise ValueError(f"all_to_all: one rank receives {int(recv_counts.sum())} rows, expected {x.shape[0]}, the rows it sends")
    return torch.empty((int(recv_counts.sum()), *x.shape[1:]), dtype=x.dtype, device="meta")


def _all_to_all_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for s in _samples(dtype, seed):
        counts = torch.tensor([s.args[0].shape[0]])
        yield Sample(s.name, (s.args[0], counts, counts.clone()), {}, s.tags)


def _all_to_all_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, three = torch.zeros(3, 4, dtype=dtype), torch.tensor([3])
    yield WrongInput(
        "ranks", (x, torch.tensor([1, 2]), three), {}, r"send_counts is torch.int64 \(2,\), expected torch.int64 \(1,\)"
    )
    yield WrongInput("type", (x, three, three.int()), {}, r"recv_counts is torch.int32")
    yield WrongInput("sum", (x, torch.tensor([2]), three), {}, r"send_counts add up to 2, expected 3")
    yield WrongInput("receive", (x, three, torch.tensor([4])), {}, r"one rank receives 4 rows, expected 3")


def _all_to_all_cost(x: Tensor, send_counts: Tensor, recv_counts: Tensor, *, group: Group = None) -> Cost:
    row = tensors_bytes(x) // max(x.shape[0], 1)
    return Cost(0, 0, tensors_bytes(x), int(recv_counts.sum()) * row, "fp32")


all_to_all = Contract(
    name="all_to_all",
    reference=_all_to_all,
    meta=_all_to_all_meta,
    samples=_all_to_all_samples,
    errors=_all_to_all_errors,
    bound=lambda x, send_counts, recv_counts, *, group=None, golden, found: (None,),
    cost=_all_to_all_cost,
)
