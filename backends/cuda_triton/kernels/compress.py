"""The compressor: both projections as one product, pooling with norm and rotation, and the state written afterwards.

Shapes: T tokens of a program, D hidden, w projection width, c entry width, m ratio, S splits of D, L tokens of a step of the pooling,
R2 rotary pairs, P state rows per block. A row is k (w) followed by s (w).
"""

import triton
import triton.language as tl

from backends.cuda_triton.kernels.paged import token_place


@triton.jit
def project(
    x_ptr: tl.tensor,
    wkv_ptr: tl.tensor,
    wgate_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    tokens: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """rows[split, t] = k and s without ape over the split's chunk of D, fp32. program_id(1): blocks of k's columns, then those of s."""
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    wide_blocks = tl.cdiv(width, BLOCK_N)
    gate = tl.program_id(1) // wide_blocks
    column_N = tl.program_id(1) % wide_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr = tl.multiple_of(tl.where(gate == 0, wkv_ptr, wgate_ptr), ALIGN)
    first = tl.program_id(2) * chunk
    acc_TN = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for k in range(first, min(first + chunk, hidden), BLOCK_K):
        at_K = k + tl.arange(0, BLOCK_K)
        x_TK = tl.load(
            x_ptr + token_T.to(tl.int64)[:, None] * hidden + at_K[None, :],
            mask=(token_T < tokens)[:, None] & (at_K < hidden)[None, :],
            other=0.0,
        )
        weight_NK = tl.load(
            weight_ptr + column_N[:, None] * hidden + at_K[None, :],
            mask=(column_N < width)[:, None] & (at_K < hidden)[None, :],
            other=0.0,
        )
        acc_TN = tl.dot(x_TK, tl.trans(weight_NK), acc_TN)
    row_T = (tl.program_id(2).to(tl.int64) * tokens + token_T) * (2 * width)
    target_TN = rows_ptr + row_T[:, None] + (gate * width + column_N)[None, :]
    tl.store(target_TN, acc_TN, mask=(token_T < tokens)[:, None] & (column_N < width)[None, :])


@triton.jit
def pool(
    rows_ptr: tl.tensor,
    ape_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    state_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    batch: tl.tensor,
    table_blocks: tl.tensor,
    per_block: tl.tensor,
    width: tl.tensor,
    pairs: tl.tensor,
    eps: tl.tensor,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    ENTRY: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Entry program_id(0) of those that the call completes: a softmax per channel over its tokens, norm, rotation; rows past them are 0."""
    entry = tl.program_id(0)
    sequence_B = tl.arange(0, BATCH)
    here_B = sequence_B < batch
    low_B = tl.load(cu_ptr + sequence_B, mask=here_B, other=0)
    start_B = tl.load(start_ptr + sequence_B, mask=here_B, other=0)
    end_B = start_B + tl.load(cu_ptr + 1 + sequence_B, mask=here_B, other=0) - low_B
    ends_B = tl.cumsum(end_B // RATIO - start_B // RATIO, axis=0)
    sequence = tl.sum((ends_B <= entry).to(tl.int32), axis=0)
    is_own_B = sequence_B == sequence
    before = tl.sum(tl.where(sequence_B == sequence - 1, ends_B, 0), axis=0)
    start = tl.sum(tl.where(is_own_B, start_B, 0), axis=0)
    low = tl.sum(tl.where(is_own_B, low_B, 0), axis=0)
    number = start // RATIO + entry - before
    channel_C = tl.arange(0, BLOCK_C)
    inside_C = channel_C < ENTRY
    y_C = tl.zeros((BLOCK_C,), tl.float32)
    if sequence < batch:
        top_C = tl.full((BLOCK_C,), float("-inf"), tl.float32)
        mass_C = tl.zeros((BLOCK_C,), tl.float32)
        sum_C = tl.zeros((BLOCK_C,), tl.float32)
        # with overlap the first RATIO tokens are those of the entry before, in the first halves of their rows
        count = RATIO * 2 if OVERLAP else RATIO
        for step in range(0, count, STEP):
            place_L = step + tl.arange(0, STEP)
            position_L = number * RATIO + place_L - (RATIO if OVERLAP else 0)
            valid_L = (place_L < count) & (position_L >= 0)
            shift_L = tl.zeros((STEP,), tl.int32)
            if OVERLAP:
                shift_L = tl.where(place_L < RATIO, 0, ENTRY)
            column_LC = shift_L[:, None] + channel_C[None, :]
            old_LC = (valid_L & (position_L < start))[:, None] & inside_C[None, :]
            new_LC = (valid_L & (position_L >= start))[:, None] & inside_C[None, :]
            safe_L = tl.where(valid_L, position_L, 0)
            block_L = tl.load(table_ptr + sequence * table_blocks + safe_L // per_block, mask=valid_L & (position_L < start), other=0)
            state_L = (block_L.to(tl.int64) * per_block + safe_L % per_block) * (2 * width)
            k_LC = tl.load(state_ptr + state_L[:, None] + column_LC, mask=old_LC, other=0.0)
            s_LC = tl.load(state_ptr + state_L[:, None] + width + column_LC, mask=old_LC, other=0.0)
            row_L = tl.where(valid_L & (position_L >= start), low + position_L - start, 0).to(tl.int64)
            for split in tl.static_range(SPLITS):
                part_LC = ((row_L + split * tokens) * (2 * width))[:, None] + column_LC
                k_LC += tl.load(rows_ptr + part_LC, mask=new_LC, other=0.0)
                s_LC += tl.load(rows_ptr + part_LC + width, mask=new_LC, other=0.0)
            s_LC += tl.load(ape_ptr + (safe_L % RATIO)[:, None] * width + column_LC, mask=new_LC, other=0.0)
            s_LC = tl.where(valid_L[:, None], s_LC, float("-inf"))
            higher_C = tl.maximum(top_C, tl.max(s_LC, axis=0))
            # the first step may hold no valid token: an entry 0 has none before it
            anchor_C = tl.where(higher_C == float("-inf"), 0.0, higher_C)
            weight_LC = tl.exp(s_LC - anchor_C[None, :])
            shrink_C = tl.exp(top_C - anchor_C)
            mass_C = mass_C * shrink_C + tl.sum(weight_LC, axis=0)
            sum_C = sum_C * shrink_C + tl.sum(weight_LC * k_LC, axis=0)
            top_C = higher_C
        pooled_C = tl.where(inside_C, sum_C / mass_C, 0.0).to(out_ptr.dtype.element_ty).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(pooled_C * pooled_C, axis=0) / ENTRY + eps)
        y_C = pooled_C * inverse * tl.load(norm_ptr + channel_C, mask=inside_C, other=0.0).to(tl.float32)
        a_R, b_R = tl.split(tl.reshape(y_C, (BLOCK_C // 2, 2)))
        pair_R = tl.arange(0, BLOCK_C // 2) - (ENTRY // 2 - pairs)
        turned_R = (pair_R >= 0) & (pair_R < pairs)
        cos_R = tl.load(cos_ptr + entry * pairs + pair_R, mask=turned_R, other=1.0)
        sin_R = tl.load(sin_ptr + entry * pairs + pair_R, mask=turned_R, other=0.0)
        y_C = tl.reshape(tl.join(a_R * cos_R - b_R * sin_R, a_R * sin_R + b_R * cos_R), (BLOCK_C,))
    tl.store(out_ptr + entry.to(tl.int64) * ENTRY + channel_C, y_C.to(out_ptr.dtype.element_ty), mask=inside_C)


@triton.jit
def store(
    rows_ptr: tl.tensor,
    ape_ptr: tl.tensor,
    state_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    tokens: tl.tensor,
    batch: tl.tensor,
    table_blocks: tl.tensor,
    per_block: tl.tensor,
    width: tl.tensor,
    RATIO: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """k and s of token program_id(0) into its state row, unless it is padding or its block is not stored."""
    token = tl.program_id(0)
    if token < tl.load(cu_ptr + batch):
        sequence, position = token_place(token, cu_ptr, start_ptr, batch, BATCH)
        block = tl.load(table_ptr + sequence * table_blocks + position // per_block).to(tl.int64)
        if block > 0:
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = column < 2 * width
            row = tl.zeros((BLOCK,), tl.float32)
            for split in tl.static_range(SPLITS):
                row += tl.load(rows_ptr + (token.to(tl.int64) + split * tokens) * (2 * width) + column, mask=inside, other=0.0)
            row += tl.load(ape_ptr + position % RATIO * width + column - width, mask=inside & (column >= width), other=0.0)
            tl.store(state_ptr + (block * per_block + position % per_block) * (2 * width) + column, row, mask=inside)
