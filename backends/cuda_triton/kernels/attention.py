"""Attention over gathered rows, each key and value of every head, with a sink: one pass with a running softmax, and the combine.

Shapes: H heads of a program, C channels, N rows of a step, S splits of the rows of a query, T tokens, k chosen entries.
Exponents are in base 2: logits carry the factor log2(e).
"""

import triton
import triton.language as tl

from backends.cuda_triton.kernels.paged import row_unit, token_place

_LOWEST = tl.constexpr(-1e30)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _packed_rows(row_N: tl.tensor, scale_N: tl.tensor, valid_N: tl.tensor, NOPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """e4m3 codes [N, C] that begin at row_N, times the e8m0 bytes of 64 channels each at scale_N; bf16, which holds them exactly."""
    channel_C = tl.arange(0, BLOCK_C)
    code_NC = tl.load(row_N[:, None] + channel_C[None, :], mask=valid_N[:, None] & (channel_C < NOPE)[None, :], other=0)
    GROUPS: tl.constexpr = (BLOCK_C + 63) // 64
    group_G = tl.arange(0, GROUPS)
    byte_NG = tl.load(scale_N[:, None] + group_G[None, :], mask=valid_N[:, None] & (group_G * 64 < NOPE)[None, :], other=0)
    power_NG = (byte_NG.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    value_NGC = tl.reshape(code_NC.to(tl.float8e4nv, bitcast=True).to(tl.float32), (BLOCK_N, GROUPS, BLOCK_C // GROUPS))
    return tl.reshape(value_NGC * power_NG[:, :, None], (BLOCK_N, BLOCK_C)).to(tl.bfloat16)


@triton.jit
def _plain_rows(row_N: tl.tensor, valid_N: tl.tensor, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr) -> tl.tensor:
    """CHANNELS channels that begin at row_N, padded with zeros to [N, C]."""
    channel_C = tl.arange(0, BLOCK_C)
    inside_NC = valid_N[:, None]
    if CHANNELS != BLOCK_C:
        inside_NC = inside_NC & (channel_C < CHANNELS)[None, :]
    return tl.load(row_N[:, None] + channel_C[None, :], mask=inside_NC, other=0.0)


@triton.jit
def _weigh(logit_HN: tl.tensor, valid_N: tl.tensor, top_H: tl.tensor, mass_H: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """(weights [H, N], factor of what was summed before, largest logit, sum of weights); a row that is not valid gets no weight."""
    logit_HN = tl.where(valid_N[None, :], logit_HN * scale, float("-inf"))
    higher_H = tl.maximum(top_H, tl.max(logit_HN, axis=1))
    weight_HN = tl.exp2(logit_HN - higher_H[:, None])
    shrink_H = tl.exp2(top_H - higher_H)
    return weight_HN, shrink_H, higher_H, mass_H * shrink_H + tl.sum(weight_HN, axis=1)


@triton.jit
def places(
    index_ptr: tl.tensor,
    window_table_ptr: tl.tensor,
    cmp_table_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    batch: tl.tensor,
    window: tl.tensor,
    window_blocks: tl.tensor,
    window_units: tl.tensor,
    cmp_blocks: tl.tensor,
    cmp_units: tl.tensor,
    most: tl.tensor,
    ratio: tl.tensor,
    CHOSEN: tl.constexpr,
    WINDOW_PER_BLOCK: tl.constexpr,
    CMP_PER_BLOCK: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    SCALE_UNITS: tl.constexpr,
    PACKED: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Where the rows of token program_id(0) begin, in units, in a list of `most` + window: entries, then the window; -1 where there is none.

    CHOSEN: entries are the `most` of index, otherwise all completed ones. `rows` int32 [T, 2]: how many entries are listed, and how many rows.
    PACKED: behind the list another one, where their scales begin, counted from the first scale of the first block.
    """
    token = tl.program_id(0)
    sequence, position = token_place(token, cu_ptr, start_ptr, batch, BATCH)
    place_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if CHOSEN:
        entries = most
        entry_N = tl.load(index_ptr + token.to(tl.int64) * most + place_N, mask=place_N < most, other=-1)
    else:
        entries = tl.minimum((position + 1) // ratio, most)
        entry_N = tl.where(place_N < entries, place_N, -1)
    entry_table_ptr = cmp_table_ptr + sequence.to(tl.int64) * cmp_blocks
    recent = tl.minimum(position + 1, window)
    rows = entries + recent
    is_window_N = (place_N >= entries) & (place_N < rows)
    row_N = position + 1 - recent + place_N - entries
    row_table_ptr = window_table_ptr + sequence.to(tl.int64) * window_blocks
    out_ptr += token.to(tl.int64) * (most + window) * (2 if PACKED else 1)
    for part in tl.static_range(2 if PACKED else 1):
        entry_unit_N = row_unit(entry_N, entry_N >= 0, entry_table_ptr, cmp_units, SCALE_UNITS if part else ROW_UNITS, CMP_PER_BLOCK)
        unit_N = row_unit(row_N, is_window_N, row_table_ptr, window_units, SCALE_UNITS if part else ROW_UNITS, WINDOW_PER_BLOCK)
        unit_N = tl.where(entry_N >= 0, entry_unit_N, tl.where(is_window_N, unit_N, -1))
        tl.store(out_ptr + part * (most + window) + place_N, unit_N, mask=place_N < rows)
    if tl.program_id(1) == 0:
        tl.store(rows_ptr + token * 2, entries)
        tl.store(rows_ptr + token * 2 + 1, rows)


@triton.jit
def attend(
    q_ptr: tl.tensor,
    window_ptr: tl.tensor,
    window_table_ptr: tl.tensor,
    cmp_ptr: tl.tensor,
    cmp_table_ptr: tl.tensor,
    index_ptr: tl.tensor,
    sink_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    batch: tl.tensor,
    window: tl.tensor,
    window_blocks: tl.tensor,
    window_units: tl.tensor,
    cmp_blocks: tl.tensor,
    cmp_units: tl.tensor,
    chosen: tl.tensor,
    ratio: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    NOPE: tl.constexpr,
    WINDOW_PER_BLOCK: tl.constexpr,
    CMP_PER_BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    UNIT: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    SCALE_UNITS: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
    KIND: tl.constexpr,
    BATCH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One token (program_id(0)), BLOCK_H heads (1) and one split of its rows (2): entries first, then the window.

    Rows begin at multiples of ALIGN bytes; places in caches are counted in UNIT elements. PACKED: NOPE channels are e4m3 codes, the
    rest is bf16 and has products of its own. KIND 0: window only, 1: all completed entries, 2: the entries of index, 3: the rows
    that `places` has written to index. With one split `out` is the result; otherwise it is fp32 [S, T, H, C], sums that are not
    normalised, and `sums` [S, T, H, 2] holds the largest logit and the sum of weights.
    """
    token = tl.program_id(0)
    split = tl.program_id(2)
    sequence, position = token_place(token, cu_ptr, start_ptr, batch, BATCH)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel_C = tl.arange(0, BLOCK_C)
    at_H = (token.to(tl.int64) * heads + head_H) * CHANNELS
    inside_HC = (head_H < heads)[:, None] & (channel_C < NOPE)[None, :]
    q_HC = tl.load(q_ptr + at_H[:, None] + channel_C[None, :], mask=inside_HC, other=0.0)
    acc_HC = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    rotary_R = tl.arange(0, BLOCK_R)
    inside_HR = (head_H < heads)[:, None] & (rotary_R < CHANNELS - NOPE)[None, :]
    if PACKED:
        q_HR = tl.load(q_ptr + at_H[:, None] + NOPE + rotary_R[None, :], mask=inside_HR, other=0.0)
        acc_HR = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    scale = scale * _LOG2E
    recent = tl.minimum(position + 1, window)
    first = position + 1 - recent
    entries = 0
    if KIND == 1:
        entries = (position + 1) // ratio
    if KIND >= 2:
        entries = chosen
    rows = entries + recent
    steps = tl.cdiv(rows, BLOCK_N)
    share = tl.cdiv(steps, SPLITS)
    low = split * share
    top_H = tl.full((BLOCK_H,), _LOWEST, tl.float32)
    mass_H = tl.zeros((BLOCK_H,), tl.float32)
    window_table_ptr += sequence.to(tl.int64) * window_blocks
    cmp_table_ptr += sequence.to(tl.int64) * cmp_blocks
    listed = chosen + window if KIND == 3 else chosen
    index_ptr += token.to(tl.int64) * listed * (2 if PACKED and KIND == 3 else 1)
    for i in range(low, tl.minimum(low + share, steps)):
        place_N = i * BLOCK_N + tl.arange(0, BLOCK_N)
        if KIND == 3:
            unit_N = tl.load(index_ptr + place_N, mask=place_N < rows, other=-1)
            valid_N = unit_N >= 0
            if PACKED:
                byte_N = tl.load(index_ptr + listed + place_N, mask=place_N < rows, other=0)
        else:
            valid_N = (place_N >= entries) & (place_N < rows)
            unit_N = row_unit(first + place_N - entries, valid_N, window_table_ptr, window_units, ROW_UNITS, WINDOW_PER_BLOCK)
            if PACKED:
                byte_N = row_unit(first + place_N - entries, valid_N, window_table_ptr, window_units, SCALE_UNITS, WINDOW_PER_BLOCK)
            if KIND != 0:
                entry_N = place_N
                if KIND == 2:
                    entry_N = tl.load(index_ptr + place_N, mask=place_N < entries, other=-1)
                is_entry_N = (place_N < entries) & (entry_N >= 0)
                unit_N = tl.where(is_entry_N, row_unit(entry_N, is_entry_N, cmp_table_ptr, cmp_units, ROW_UNITS, CMP_PER_BLOCK), unit_N)
                if PACKED:
                    entry_byte_N = row_unit(entry_N, is_entry_N, cmp_table_ptr, cmp_units, SCALE_UNITS, CMP_PER_BLOCK)
                    byte_N = tl.where(is_entry_N, entry_byte_N, byte_N)
                valid_N = valid_N | is_entry_N
        if KIND == 0:
            row_N = window_ptr + unit_N.to(tl.int64) * UNIT
        else:
            row_N = tl.where(place_N < entries, cmp_ptr, window_ptr) + unit_N.to(tl.int64) * UNIT
        row_N = tl.multiple_of(row_N, ALIGN)
        if PACKED:
            scale_N = tl.where(place_N < entries, cmp_ptr + CMP_PER_BLOCK * ROW, window_ptr + WINDOW_PER_BLOCK * ROW)
            rows_NC = _packed_rows(row_N, scale_N + byte_N.to(tl.int64) * UNIT, valid_N, NOPE, BLOCK_C, BLOCK_N)
            rotary_N = (row_N + NOPE).to(tl.pointer_type(tl.bfloat16))
            rows_NR = _plain_rows(rotary_N, valid_N, CHANNELS - NOPE, BLOCK_R)
            logit_HN = tl.dot(q_HR, tl.trans(rows_NR))
            logit_HN = tl.dot(q_HC, tl.trans(rows_NC), logit_HN)
        else:
            rows_NC = _plain_rows(row_N, valid_N, CHANNELS, BLOCK_C)
            logit_HN = tl.dot(q_HC, tl.trans(rows_NC))
        weight_HN, shrink_H, top_H, mass_H = _weigh(logit_HN, valid_N, top_H, mass_H, scale)
        weight_HN = weight_HN.to(rows_NC.dtype)
        acc_HC = tl.dot(weight_HN, rows_NC, acc_HC * shrink_H[:, None])
        if PACKED:
            acc_HR = tl.dot(weight_HN, rows_NR, acc_HR * shrink_H[:, None])
    if SPLITS == 1:
        sink_H = tl.load(sink_ptr + head_H, mask=head_H < heads, other=0.0) * _LOG2E
        higher_H = tl.maximum(top_H, sink_H)
        shrink_H = tl.exp2(top_H - higher_H)
        shrink_H = shrink_H / (mass_H * shrink_H + tl.exp2(sink_H - higher_H))
    else:
        part = split.to(tl.int64) * tokens * heads
        sums_H = sums_ptr + (part + token.to(tl.int64) * heads + head_H) * 2
        tl.store(sums_H, top_H, mask=head_H < heads)
        tl.store(sums_H + 1, mass_H, mask=head_H < heads)
        out_ptr += part * CHANNELS
        shrink_H = tl.full((BLOCK_H,), 1.0, tl.float32)
    target_H = out_ptr + at_H
    out_HC = (acc_HC * shrink_H[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(target_H[:, None] + channel_C[None, :], out_HC, mask=inside_HC)
    if PACKED:
        out_HR = (acc_HR * shrink_H[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(target_H[:, None] + NOPE + rotary_R[None, :], out_HR, mask=inside_HR)


@triton.jit
def combine(
    acc_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    sink_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Normalise the sum of the splits of one token's head (program_id(0) of rows = T * H), with the sink in the denominator."""
    row = tl.program_id(0).to(tl.int64)
    split_S = tl.arange(0, SPLITS)
    sums_S = sums_ptr + (split_S.to(tl.int64) * rows + row) * 2
    top_S = tl.load(sums_S, mask=split_S < splits, other=_LOWEST)
    mass_S = tl.load(sums_S + 1, mask=split_S < splits, other=0.0)
    sink = tl.load(sink_ptr + row % heads) * _LOG2E
    higher = tl.maximum(tl.max(top_S, axis=0), sink)
    weight_S = tl.exp2(top_S - higher)
    whole = tl.sum(weight_S * mass_S, axis=0) + tl.exp2(sink - higher)
    channel_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at_SC = (split_S.to(tl.int64) * rows + row)[:, None] * CHANNELS + channel_C[None, :]
    inside_SC = (split_S < splits)[:, None] & (channel_C < CHANNELS)[None, :]
    acc_SC = tl.load(acc_ptr + at_SC, mask=inside_SC, other=0.0)
    out_C = tl.sum(acc_SC * weight_S[:, None], axis=0) / whole
    tl.store(out_ptr + row * CHANNELS + channel_C, out_C.to(out_ptr.dtype.element_ty), mask=channel_C < CHANNELS)
