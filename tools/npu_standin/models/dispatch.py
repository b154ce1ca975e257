"""Expert parallel dispatch and combine. Ranks are threads of one process that call with the same communicator name.

Shapes: BS tokens of a rank, H channels, K experts per token, N ranks, L experts per rank, A = N * max(BS) * min(L, K) rows.
What passes from dispatch to combine is the vendor's secret; here it names source rank, token and choice of every row.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.npu_standin.models import model, needed, require, require_dtype, require_shape, soc, undefined
from tools.npu_standin.models.rounding import int8_per_row

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
WORDS = 128
PATIENCE = 60.0
"""Seconds that a rank waits for the others."""

_A2_SIZES = (*range(2, 9), 16, 32, 64, 128, 256)
_groups: dict[tuple[str, int], _Group] = {}
_guard = threading.Lock()


@dataclass
class _Group:
    """A communicator: every rank puts something in, all see everything."""

    size: int
    barrier: threading.Barrier = field(init=False)
    slots: list[object] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.slots = threading.Barrier(self.size, timeout=PATIENCE), [None] * self.size

    def exchange(self, op: str, rank: int, value: object) -> list[object]:
        """What every rank put in, in rank order. Refused when a rank stays away."""
        self.slots[rank] = value
        try:
            self.barrier.wait()
            found = list(self.slots)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            require(
                False, op, f"not all of {self.size} ranks called within {PATIENCE:.0f} s", "one call per rank, in the same order"
            )
        return found


def _group(name: str, size: int) -> _Group:
    with _guard:
        return _groups.setdefault((name, size), _Group(size))


def _check(
    op: str,
    expert_ids: Tensor,
    tokens: int,
    group: str,
    size: int,
    rank: int,
    experts: int,
    comm_alg: str,
    unused: dict[str, object],
) -> None:
    require(bool(group), op, "an empty group_ep", "the name of the HCCL communicator")
    legal = size in _A2_SIZES if soc() == "910b" else 2 <= size <= 768
    require(legal, op, f"ep_world_size {size} on {soc()}", f"{_A2_SIZES} on A2, 2..768 on A3")
    require(0 <= rank < size, op, f"ep_rank_id {rank}", f"0..{size - 1}")
    require(0 < experts <= 1024 and experts % size == 0, op, f"moe_expert_num {experts}", f"up to 1024, a multiple of {size}")
    require(comm_alg == "", op, f"comm_alg {comm_alg!r}", "'' (others are not modelled)")
    most = 256 if soc() == "910b" else 512
    require(0 < tokens <= most, op, f"BS = {tokens} on {soc()}", f"1..{most}")
    require_dtype(op, "expert_ids", expert_ids, torch.int32)
    require_shape(op, "expert_ids", expert_ids, tokens, None)
    require(1 <= expert_ids.shape[1] <= 16, op, f"K = {expert_ids.shape[1]}", "1..16")
    require(bool(((expert_ids >= 0) & (expert_ids < experts)).all()), op, "an expert id out of range", f"0 <= id < {experts}")
    ordered = expert_ids.sort(1).values
    require(
        not bool((ordered[:, 1:] == ordered[:, :-1]).any()),
        op,
        "an expert twice in a row of expert_ids",
        "distinct experts per token",
    )
    for name, value in unused.items():
        require(not value, op, f"{name} {value}", f"{name} left out (not modelled)")


def _active(op: str, mask: Tensor | None, tokens: int) -> int:
    """Number of active tokens: a mask [BS] of trues, then falses."""
    if mask is None:
        return tokens
    require_dtype(op, "x_active_mask", mask, torch.bool)
    require_shape(op, "x_active_mask", mask, tokens)
    count = int(mask.sum())
    require(bool(mask[:count].all()), op, "x_active_mask with a true behind a false", "trues first")
    return count


@model("npu::npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | None = None,
    x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(expand_x [A, H], dynamic_scales fp32 [A], assist_info int32 [A*128], expert_token_nums int64 [L], recv counts int32, tp counts, expand_scales).

    Rows of the experts of this rank, by expert, then source rank, then token; only the first sum of them is written. quant_mode 2: int8.
    """
    unused = {
        "an extra tensor": any(t is not None for t in (scales, elastic_info, performance_info)), "group_tp": group_tp, "tp_world_size": tp_world_size,
        "expert_shard_type": expert_shard_type, "shared_expert_rank_num": shared_expert_rank_num, "zero_expert_num": zero_expert_num,
        "copy_expert_num": copy_expert_num, "const_expert_num": const_expert_num, "a type": any(t is not None for t in (y_dtype, x_dtype, scales_dtype)),
    }  # fmt: skip
    require_dtype(DISPATCH, "x", x, torch.bfloat16, torch.float16)
    require_shape(DISPATCH, "x", x, None, None)
    tokens, width = x.shape
    _check(DISPATCH, expert_ids, tokens, group_ep, ep_world_size, ep_rank_id, moe_expert_num, comm_alg, unused)
    require(
        soc() != "910b" or (width <= 7168 and width % 32 == 0), DISPATCH, f"H = {width} on A2", "up to 7168, a multiple of 32"
    )
    require(quant_mode in (0, 2), DISPATCH, f"quant_mode {quant_mode}", "0 or 2 (int8 per token)")
    require(
        expert_token_nums_type in (0, 1), DISPATCH, f"expert_token_nums_type {expert_token_nums_type}", "0 cumulative or 1 counts"
    )
    require(expert_scales is None or soc() == "910b", DISPATCH, "expert_scales", "only on A2")
    active, per_rank, k = _active(DISPATCH, x_active_mask, tokens), moe_expert_num // ep_world_size, expert_ids.shape[1]
    sent = (x[:active], expert_ids[:active].long(), None if expert_scales is None else expert_scales[:active], tokens)
    everyone: list[tuple[Tensor, Tensor, Tensor | None, int]] = _group(group_ep, ep_world_size).exchange(
        DISPATCH, ep_rank_id, sent
    )  # type: ignore[assignment]
    largest = max(bs for *_, bs in everyone)
    require(
        global_bs in (0, largest * ep_world_size),
        DISPATCH,
        f"global_bs {global_bs}",
        f"0 or ranks times the largest BS, {largest * ep_world_size}",
    )
    require(
        global_bs > 0 or all(bs == tokens for *_, bs in everyone),
        DISPATCH,
        "ranks with different BS",
        "global_bs when BS differs",
    )
    capacity = ep_world_size * largest * min(per_rank, k)
    first = ep_rank_id * per_rank
    found = [
        (source, int(t), int(j), e - first)
        for e in range(first, first + per_rank)
        for source, (_, ids, _, _) in enumerate(everyone)
        for t, j in (ids == e).nonzero().tolist()
    ]
    used = len(found)
    rows = torch.stack([everyone[source][0][t] for source, t, _, _ in found]) if found else x.new_zeros(0, width)
    codes, row_scale = int8_per_row(rows) if quant_mode == 2 else (rows, None)
    expand_x, dynamic = undefined((capacity, width), codes.dtype), undefined((capacity,), torch.float32)
    expand_x[:used] = codes
    if row_scale is not None:
        dynamic[:used] = row_scale
    assist = undefined((capacity, WORDS), torch.int32)
    if found:
        assist[:used, :3] = torch.tensor([[s, t, j] for s, t, j, _ in found], dtype=torch.int32)
    counts = torch.bincount(torch.tensor([e for *_, e in found], dtype=torch.long), minlength=per_rank)
    received = torch.zeros(per_rank, ep_world_size, dtype=torch.int32)
    for source, _, _, e in found:
        received[e, source] += 1
    weights = torch.empty(0)
    if expert_scales is not None:
        weights = undefined((capacity,), torch.float32)
        for i, (source, t, j, _) in enumerate(found):
            weights[i] = needed(DISPATCH, "expert_scales of every rank", everyone[source][2])[t, j]
    tokens_per_expert = counts if expert_token_nums_type == 1 else counts.cumsum(0)
    return (
        expand_x,
        dynamic,
        assist.flatten(),
        tokens_per_expert,
        received.flatten().cumsum(0).to(torch.int32),
        torch.empty(0, dtype=torch.int32),
        weights,
    )


@model("npu::npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """[BS, H] in the type of expand_x: sum over K of expert_scales * row, plus shared_expert_x; rows of inactive tokens are undefined."""
    given = (elastic_info, ori_x, const_expert_alpha_1, const_expert_alpha_2, const_expert_v, performance_info)
    unused = {
        "an extra tensor": any(t is not None for t in given), "group_tp": group_tp, "tp_world_size": tp_world_size, "expert_shard_type": expert_shard_type,
        "shared_expert_rank_num": shared_expert_rank_num, "comm_quant_mode": comm_quant_mode, "zero_expert_num": zero_expert_num,
        "copy_expert_num": copy_expert_num, "const_expert_num": const_expert_num,
    }  # fmt: skip
    tokens, k = expert_ids.shape
    _check(COMBINE, expert_ids, tokens, group_ep, ep_world_size, ep_rank_id, moe_expert_num, comm_alg, unused)
    require_dtype(COMBINE, "expand_x", expand_x, torch.bfloat16, torch.float16)
    require_dtype(COMBINE, "expert_scales", expert_scales, torch.float32)
    require_shape(COMBINE, "expert_scales", expert_scales, tokens, k)
    require_shape(COMBINE, "assist_info_for_combine", assist_info_for_combine, expand_x.shape[0] * WORDS)
    require_shape(COMBINE, "ep_send_counts", ep_send_counts, moe_expert_num)
    used = int(ep_send_counts[-1])
    sent = (expand_x[:used], assist_info_for_combine.view(-1, WORDS)[:used, :3].tolist())
    everyone: list[tuple[Tensor, list[list[int]]]] = _group(group_ep, ep_world_size).exchange(COMBINE, ep_rank_id, sent)  # type: ignore[assignment]
    total, returned = torch.zeros(tokens, expand_x.shape[1]), torch.zeros(tokens, dtype=torch.long)
    for rows, sources in everyone:
        for row, (source, t, j) in zip(rows, sources, strict=True):
            if source == ep_rank_id:
                total[t] += expert_scales[t, j] * row.float()
                returned[t] += 1
    active = _active(COMBINE, x_active_mask, tokens)
    require(
        bool((returned[:active] == k).all()),
        COMBINE,
        f"{returned.tolist()} rows per token",
        f"{k}: dispatch's outputs passed on unchanged",
    )
    if shared_expert_x is not None:
        require_dtype(COMBINE, "shared_expert_x", shared_expert_x, expand_x.dtype)
        require_shape(COMBINE, "shared_expert_x", shared_expert_x, *total.shape)
        total += shared_expert_x.float()
    y = undefined(total.shape, expand_x.dtype)
    y[:active] = total[:active].to(expand_x.dtype)
    return y
