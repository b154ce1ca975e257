"""The KV compressor: pools every `ratio` tokens into one normed, rotated cache entry, over a paged state of earlier tokens.

Shapes: T tokens over B sequences, D hidden, m ratio, c entry width, w = 2c with overlapping windows or c without, E output rows,
R2 rotary pairs, P state rows per block. A state row is k (w) followed by s (w) of the token at its absolute position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.norm import rms_norm
from ops.rope import rope, rope_bound


def entry_list(cu_seqlens: Tensor, start_pos: Tensor, ratio: int) -> list[tuple[int, int]]:
    """(sequence, entry) of every entry the call completes, in output order."""
    cu, start = cu_seqlens.tolist(), start_pos.tolist()
    return [(b, i) for b, s in enumerate(start) for i in range(s // ratio, (s + cu[b + 1] - cu[b]) // ratio)]


def _positions(cu_seqlens: Tensor, start_pos: Tensor) -> Tensor:
    shift = torch.repeat_interleave(start_pos - cu_seqlens[:-1], cu_seqlens.diff().long())
    return torch.arange(int(cu_seqlens[-1]), device=shift.device) + shift


def _project(x: Tensor, wkv: Tensor, wgate: Tensor, ape_T: Tensor) -> Tensor:
    return torch.cat((x @ wkv.T, x @ wgate.T + ape_T), dim=1)


def _windows(
    rows_T2w: Tensor, state: Tensor, state_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, ratio: int, c: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(k, s) of the tokens pooled into each entry, [m or 2m, c], in the order of `entry_list`."""
    w = rows_T2w.shape[1] // 2
    cu, start, table = cu_seqlens.tolist(), start_pos.tolist(), state_table.tolist()

    def block(b: int, i: int) -> Tensor:
        rows = []
        for p in range(i * ratio, (i + 1) * ratio):
            old = p < start[b]
            rows.append(state[table[b][p // state.shape[1]], p % state.shape[1]] if old else rows_T2w[cu[b] + p - start[b]])
        return torch.stack([r.to(rows_T2w.dtype) for r in rows])

    for b, i in entry_list(cu_seqlens, start_pos, ratio):
        own = block(b, i)
        k, s = own[:, w - c : w], own[:, 2 * w - c :]
        if w > c and i > 0:
            before = block(b, i - 1)
            k, s = torch.cat((before[:, :c], k)), torch.cat((before[:, w : w + c], s))
        yield k, s


def _store(rows_T2w: Tensor, state: Tensor, state_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor) -> None:
    t = 0
    for b, (s, n) in enumerate(zip(start_pos.tolist(), cu_seqlens.diff().tolist(), strict=True)):
        for p in range(s, s + n):
            if block := int(state_table[b, p // state.shape[1]]):
                state[block, p % state.shape[1]] = rows_T2w[t].to(state.dtype)
            t += 1


def _compress(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Entries completed by this call: softmax-pooled k, RMS-normed, rotated; writes k and s of the call's tokens to the state.

    k_p = wkv x_p, s_p = wgate x_p + ape[p mod m], fp32. w = c: entry i pools tokens i*m..i*m+m-1 per channel with softmax(s).
    w = 2c: one softmax over the first halves of block i-1 (absent for i = 0) and the second halves of block i.
    Then: cast to x's type, RMSNorm, rope of the last 2*R2 channels in interleaved pairs.

    x [T, D] float; wkv, wgate [w, D] float; ape fp32 [m, w]; norm_weight [c] float; cos, sin fp32 [E, R2], row e being that of
    position i*m of the e-th completed entry; state fp32 [blocks, P, 2w] (written); state_table int32 [B, n]: block of row p // P,
    0 = not stored; cu_seqlens int32 [B+1]; start_pos int32 [B]. Tokens of x past cu_seqlens[-1] are padding.
    Earlier tokens that are needed (up to 2m-1 back) come from the state as it was before the call and must be stored there;
    tokens whose table entry is 0 are not written. Returns [E, c] in x's type: sequence after sequence the entries start // m ..
    (start + n) // m - 1; rows past their count are 0. Source: specification 6. ValueError: see `meta`.
    """
    tokens, c = int(cu_seqlens[-1]), norm_weight.shape[0]
    ape_T = ape.to(compute)[_positions(cu_seqlens, start_pos) % ratio]
    rows_T2w = _project(x_TD[:tokens].to(compute), wkv.to(compute), wgate.to(compute), ape_T)
    pooled = [
        (torch.softmax(s, dim=0) * k).sum(0) for k, s in _windows(rows_T2w, state, state_table, cu_seqlens, start_pos, ratio, c)
    ]
    _store(rows_T2w, state, state_table, cu_seqlens, start_pos)
    entries = torch.zeros(cos_ER2.shape[0], c, dtype=compute)
    if n := len(pooled):
        # exact arithmetic has no cast before the norm: that rounding is part of the bound
        normed = rms_norm.reference(torch.stack(pooled), norm_weight, eps=eps, compute=compute)
        entries[:n] = rope.reference(normed, cos_ER2[:n], sin_ER2[:n], compute=compute)
    return entries


def _expect(what: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(found.shape) != shape:
        raise ValueError(f"compress: {what} has shape {tuple(found.shape)}, expected {shape}")
    if found.dtype != dtype if dtype else not found.is_floating_point():
        raise ValueError(f"compress: {what} is {found.dtype}, expected {dtype or 'a floating type'}")


def _check_tokens(
    x: Tensor, entries: int, state: Tensor, state_table: Tensor, cu: Tensor, start_pos: Tensor, ratio: int, reach: int
) -> None:
    batch = start_pos.shape[0]
    _expect("cu_seqlens", cu, (batch + 1,), torch.int32)
    _expect("start_pos", start_pos, (batch,), torch.int32)
    offsets, starts, (blocks, per_block) = cu.tolist(), start_pos.tolist(), state.shape[:2]
    if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > x.shape[0]:
        raise ValueError(f"compress: cu_seqlens is {offsets}, expected to rise from 0 to at most the {x.shape[0]} tokens of x")
    if min(starts, default=0) < 0:
        raise ValueError(f"compress: start_pos is {starts}, expected no negative position")
    if (completed := len(entry_list(cu, start_pos, ratio))) > entries:
        raise ValueError(f"compress: cos_ER2 has {entries} rows, expected at least {completed}, the entries this call completes")
    if state_table.numel():
        low, high = (int(v) for v in state_table.aminmax())
        if low < 0 or high >= blocks:
            raise ValueError(f"compress: state_table holds {low}..{high}, expected blocks 0..{blocks - 1}")
    for b, (start, n) in enumerate(zip(starts, cu.diff().tolist(), strict=True)):
        if n and (start + n - 1) // per_block >= state_table.shape[1]:
            found = f"state_table has {state_table.shape[1]} blocks of {per_block} rows per sequence"
            raise ValueError(f"compress: {found}, expected enough for sequence {b}, which ends at token {start + n}")
        first = start // ratio
        if (start + n) // ratio > first:
            lost = [p for p in range(max(first - reach, 0) * ratio, start) if not state_table[b, p // per_block]]
            if lost:
                found = "whose state_table entry is 0 (not stored)"
                raise ValueError(f"compress: sequence {b} needs the state of token {lost[0]}, {found}; keep 2m-1 tokens behind")


def _compress_meta(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> Tensor:
    if x_TD.dim() != 2 or not x_TD.is_floating_point():
        raise ValueError(f"compress: x is {x_TD.dtype} {tuple(x_TD.shape)}, expected [T, D] of a floating type")
    if ratio < 1:
        raise ValueError(f"compress: ratio is {ratio}, expected at least 1")
    w, c = wkv.shape[0], norm_weight.shape[-1]
    if w not in (c, 2 * c):
        raise ValueError(f"compress: wkv has {w} rows, expected {c} (no overlap) or {2 * c} (overlap) for a norm weight of {c}")
    _expect("norm_weight", norm_weight, (c,), None)
    _expect("wkv", wkv, (w, x_TD.shape[1]), None)
    _expect("wgate", wgate, (w, x_TD.shape[1]), None)
    _expect("ape", ape, (ratio, w), torch.float32)
    if c % 2:
        raise ValueError(f"compress: entries have {c} channels, expected an even number")
    if cos_ER2.dim() != 2 or 2 * cos_ER2.shape[1] > c:
        raise ValueError(f"compress: cos_ER2 has shape {tuple(cos_ER2.shape)}, expected [E, R2] with 2*R2 <= {c}")
    _expect("cos_ER2", cos_ER2, tuple(cos_ER2.shape), torch.float32)
    _expect("sin_ER2", sin_ER2, tuple(cos_ER2.shape), torch.float32)
    if state.dim() != 3 or state_table.dim() != 2:
        found = f"state has shape {tuple(state.shape)}, state_table {tuple(state_table.shape)}"
        raise ValueError(f"compress: {found}; expected [blocks, P, {2 * w}] and [B, blocks per sequence]")
    _expect("state", state, (*state.shape[:2], 2 * w), torch.float32)
    _expect("state_table", state_table, (start_pos.shape[0], state_table.shape[1]), torch.int32)
    _check_tokens(x_TD, cos_ER2.shape[0], state, state_table, cu_seqlens, start_pos, ratio, w // c - 1)
    return torch.empty(cos_ER2.shape[0], c, dtype=x_TD.dtype, device="meta")


def _pool_error(k: Tensor, s: Tensor, dk: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled value and its error from errors dk, ds of the projections and fp32 pooling; all [slots, c] -> [c]."""
    u = bounds.roundoff(torch.float32)
    a = torch.softmax(s, dim=0)
    pooled = (a * k).sum(0)
    ds = ds + 2 * u * (s - s.amax(0)).abs() + 4 * u  # rounding of s - max, of exp and of the division
    spread = (a * (k - pooled).abs() * ds).sum(0)
    return pooled, spread + (a * dk).sum(0) + bounds.accumulate(k.shape[0], (a * k.abs()).sum(0))


def _compress_bound(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    meta = (state_table, cu_seqlens, start_pos)
    c, u, u_x = norm_weight.shape[0], bounds.roundoff(torch.float32), bounds.roundoff(x_TD.dtype)
    x, kv, gate = (t.double() for t in (x_TD[: int(cu_seqlens[-1])], wkv, wgate))
    ape_T = ape.double()[_positions(cu_seqlens, start_pos) % ratio]
    error = bounds.accumulate(x.shape[1], _project(x.abs(), kv.abs(), gate.abs(), ape_T.abs()))
    state_bound = torch.zeros(state.shape, dtype=torch.float64)
    _store(error, state_bound, *meta)
    entry_bound = torch.zeros_like(golden[0])
    values = _windows(_project(x, kv, gate, ape_T), state.double(), *meta, ratio, c)
    errors = _windows(error, torch.zeros_like(state_bound), *meta, ratio, c)
    weight, rotary = norm_weight.double().abs(), 2 * cos_ER2.shape[1]
    for e, ((k, s), (dk, ds)) in enumerate(zip(values, errors, strict=True)):
        pooled, d = _pool_error(k, s, dk, ds)
        # below the smallest normal number, which fp16 reaches, a rounding is absolute
        d = d + u_x * (pooled.abs() + d + torch.finfo(x_TD.dtype).smallest_normal)
        inverse = torch.rsqrt(pooled.square().mean() + eps)
        # first order through v*r with r = (mean v^2 + eps)^-1/2; 1/32 more for the second order, d being at most u_x relative
        d = (1 + 2**-5) * weight * inverse * (d + pooled.abs() * inverse.square() * (pooled.abs() * d).mean())
        normed = weight * pooled.abs() * inverse
        d = d + bounds.SPREAD * 4 * u * normed
        # a backend may round the normed value to x's type before the rotation, as DeepSeek's own code does
        d[c - rotary :] += u_x * normed[c - rotary :]
        entry_bound[e] = rope_bound(normed[None], cos_ER2[e : e + 1], sin_ER2[e : e + 1], d[None])[0] * (1 + u_x)
    return entry_bound, state_bound


def _compress_cost(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> Cost:
    w, c = wkv.shape[0], norm_weight.shape[0]
    tokens = int(cu_seqlens[-1])
    entries = entry_list(cu_seqlens, start_pos, ratio)
    starts = start_pos.tolist()
    blocks = {(b, j) for b, i in entries for j in range(max(i - w // c + 1, 0), i + 1)}
    old = sum(min(max(starts[b] - j * ratio, 0), ratio) for b, j in blocks)
    owner = torch.repeat_interleave(cu_seqlens.diff().long())
    stored = int(state_table[owner, _positions(cu_seqlens, start_pos) // state.shape[1]].count_nonzero())
    row = 2 * w * state.element_size()
    read = tensors_bytes(x_TD, wkv, wgate, ape, norm_weight, cos_ER2, sin_ER2, state_table, cu_seqlens, start_pos) + old * row
    written = cos_ER2.shape[0] * c * x_TD.element_size() + stored * row
    pooling = 5 * len(entries) * ratio * w + 8 * len(entries) * c
    return Cost(4 * tokens * x_TD.shape[1] * w, tokens * w + pooling, read, written, "bf16")


def _case(
    dtype: torch.dtype,
    seed: int,
    lengths: list[int],
    starts: list[int],
    *,
    ratio: int = 4,
    c: int = 48,
    overlap: bool = True,
    hidden: int = 64,
    rotary: int = 16,
    per_block: int = 4,
    drop: bool = False,
    padding: int = 0,
    scale: float = 1.0,
    gain: float = 1.0,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    w = 2 * c if overlap else c
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    start_pos = torch.tensor(starts, dtype=torch.int32)
    ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    table = torch.zeros(len(starts), max(ends, default=0) // per_block + 1, dtype=torch.int32)
    for b, (s, end) in enumerate(zip(starts, ends, strict=True)):
        # blocks behind the reach of the call are recycled; `drop` keeps the last tokens only, as a long prefill does
        low = max(s // ratio - overlap, 0) * ratio // per_block
        table[b, low : -(-end // per_block)] = 1
        if drop:
            table[b, -(-s // per_block) : max(end - ratio, 0) // per_block] = 0
    used = int(table.sum())
    table[table > 0] = (torch.randperm(used, generator=g) + 1).int()
    state = torch.randn(used + 1, per_block, 2 * w, generator=g)
    state[0] = 1e4
    positions = torch.tensor([i * ratio for _, i in entry_list(cu, start_pos, ratio)] + [10**6] * padding)
    angle = positions[:, None] * 10000.0 ** -(torch.arange(rotary // 2) / max(rotary // 2, 1))
    x = (torch.randn(int(cu[-1]) + padding, hidden, generator=g) * scale).to(dtype)
    wkv, wgate = (torch.randn(w, hidden, generator=g) * hidden**-0.5 * f for f in (1.0, gain))
    ape = torch.randn(ratio, w, generator=g)
    norm_weight = (1 + 0.3 * torch.randn(c, generator=g)).to(norm_dtype or dtype)
    return x, wkv.to(dtype), wgate.to(dtype), ape, norm_weight, angle.cos(), angle.sin(), state, table, cu, start_pos


def _compress_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    long: dict[str, Any] = {"ratio": 128, "overlap": False, "per_block": 128}
    cases: list[tuple[str, list[int], list[int], dict[str, Any]]] = [
        ("zero", [0], [0], {}),
        ("no-sequence", [], [], {}),
        ("no-rows", [0, 0], [5, 0], {}),
        *((f"one-at-{s}", [1], [s], {}) for s in (0, 3, 4, 5, 7)),
        *((f"six-at-{s}", [6], [s], {"per_block": 16}) for s in (0, 2, 3, 4, 5, 127, 128, 129)),
        ("ragged", [5, 0, 1, 13, 0, 4, 2], [0, 9, 7, 127, 0, 130, 3], {"padding": 3}),
        ("drop", [37], [6], {"drop": True}),
        ("index", [9, 4], [2, 8], {"c": 128, "hidden": 96, "rotary": 64}),
        ("no-rope", [9], [1], {"rotary": 0}),
        ("peaked", [9], [3], {"gain": 40.0}),
        ("tiny", [9], [0], {"scale": 1e-4, "norm_dtype": torch.float32}),
        ("flash", [5], [3], {"c": 512, "hidden": 4096, "rotary": 64}),
        ("long-zero", [0], [128], long),
        *((f"long-one-at-{s}", [1], [s], long) for s in (0, 126, 127, 128, 255)),
        *((f"long-three-at-{s}", [3], [s], {**long, "per_block": 16}) for s in (125, 126, 127, 128, 129)),
        ("long-two-entries", [257], [0], long),
        ("long-ragged", [130, 0, 2, 1, 3], [0, 5, 127, 255, 129], {**long, "padding": 2}),
        ("long-drop", [300], [100], {**long, "per_block": 16, "drop": True}),
        ("long-flash", [2], [127], {**long, "c": 512, "hidden": 4096, "rotary": 64}),
        ("many", [90], [5], {}),
    ]
    for j, (name, lengths, starts, options) in enumerate(cases):
        args = _case(dtype, seed + j, lengths, starts, **options)
        count = {0: "zero", 1: "one"}.get(sum(lengths), "odd" if sum(lengths) % 2 else "even")
        tags = (count, "overlap" if options.get("overlap", True) else "plain", "ragged" if len(lengths) > 1 else "single")
        yield Sample(name, args, {"ratio": options.get("ratio", 4), "eps": 1e-6}, tags)


def _compress_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    good = _case(dtype, 0, [6, 2], [3, 9])
    names = ("x", "wkv", "wgate", "ape", "norm_weight", "cos", "sin", "state", "state_table", "cu_seqlens", "start_pos")
    wrong: list[tuple[str, str, Any, str]] = [
        ("x-type", "x", good[0].int(), r"x is torch.int32"),
        ("width", "wkv", good[1][:50], r"wkv has 50 rows, expected 48 \(no overlap\) or 96"),
        ("gate", "wgate", good[2][:, :5], r"wgate has shape \(96, 5\), expected \(96, 64\)"),
        ("ape-shape", "ape", good[3][:3], r"ape has shape \(3, 96\), expected \(4, 96\)"),
        ("ape-type", "ape", good[3].double(), r"ape is torch.float64, expected torch.float32"),
        ("few-rows", "cos", good[5][:1], r"sin_ER2 has shape \(2, 8\), expected \(1, 8\)"),
        ("rope-width", "cos", torch.zeros(2, 25), r"expected \[E, R2\] with 2\*R2 <= 48"),
        ("state-width", "state", good[7][:, :, :100], r"state has shape .* 100\), expected .* 192\)"),
        ("state-type", "state", good[7].half(), r"state is torch.float16, expected torch.float32"),
        ("lost", "state_table", torch.zeros_like(good[8]), r"sequence 0 needs the state of token 0"),
        ("table-range", "state_table", good[8] + 99, r"expected blocks 0\.\."),
        ("table-width", "state_table", good[8][:, :1], r"state_table has 1 blocks of 4 rows"),
        ("offsets", "cu_seqlens", torch.tensor([0, 6, 9], dtype=torch.int32), r"cu_seqlens is \[0, 6, 9\]"),
        ("batch", "cu_seqlens", torch.tensor([0, 8], dtype=torch.int32), r"cu_seqlens has shape \(2,\), expected \(3,\)"),
        ("start", "start_pos", torch.tensor([3, -1], dtype=torch.int32), r"start_pos is \[3, -1\]"),
        ("entries", "start_pos", torch.tensor([3, 10], dtype=torch.int32), r"cos_ER2 has 2 rows, expected at least 3"),
    ]
    for name, position, value, match in wrong:
        args = list(good)
        args[names.index(position)] = value
        yield WrongInput(name, tuple(args), {"ratio": 4, "eps": 1e-6}, match)
    yield WrongInput("ratio", good, {"ratio": 0, "eps": 1e-6}, r"ratio is 0, expected at least 1")


compress = Contract(
    name="compress",
    reference=_compress,
    meta=_compress_meta,
    samples=_compress_samples,
    errors=_compress_errors,
    bound=_compress_bound,
    cost=_compress_cost,
    mutates=("state",),
)
