"""Index scores of the entries a query may see.

Shapes: H index heads, d index width, N entries of a program, T tokens.
"""

import triton
import triton.language as tl

from backends.cuda_triton.kernels.paged import row_offset, token_place


@triton.jit
def scores(
    q_ptr: tl.tensor,
    w_ptr: tl.tensor,
    key_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    score_ptr: tl.tensor,
    first_token: tl.tensor,
    last_token: tl.tensor,
    batch: tl.tensor,
    blocks: tl.tensor,
    block_stride: tl.tensor,
    columns: tl.tensor,
    ratio: tl.tensor,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """score[t, i] = sum over heads of w * max(0, <q, key_i>) for BLOCK_N entries (program_id(0)) and TOKENS tokens (program_id(1)).

    Keys are loaded once for the neighbouring tokens of a sequence. Columns past the last visible entry are not written.
    PACKED: e4m3 codes and one fp32 power of two.
    """
    low = first_token + tl.program_id(1) * TOKENS
    high = tl.minimum(low + TOKENS, last_token)
    from_sequence, _ = token_place(low, cu_ptr, start_ptr, batch, BATCH)
    to_sequence, _ = token_place(high - 1, cu_ptr, start_ptr, batch, BATCH)
    entry_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    width_D = tl.arange(0, BLOCK_D)
    # a loop's counter has 32 bits
    wide = tl.full((), 0, tl.int64)
    for sequence in range(from_sequence, to_sequence + 1):
        begin = tl.load(cu_ptr + sequence)
        end = tl.minimum(tl.load(cu_ptr + sequence + 1), high)
        shift = tl.load(start_ptr + sequence) - begin + 1
        most = (end - 1 + shift) // ratio
        if (tl.program_id(0) * BLOCK_N < most) & (begin < end):
            row_table_ptr = table_ptr + (wide + sequence) * blocks
            stored_N = entry_N < most
            at_N = row_offset(entry_N, stored_N, row_table_ptr, block_stride, ROW, PER_BLOCK)
            key_ND = tl.load(
                key_ptr + at_N[:, None] + width_D[None, :], mask=stored_N[:, None] & (width_D < WIDTH)[None, :], other=0
            )
            if PACKED:
                key_ND = key_ND.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
                scale_N = row_offset(entry_N, stored_N, row_table_ptr, block_stride, 4, PER_BLOCK) + PER_BLOCK * ROW
                scale_N = tl.load((key_ptr + scale_N).to(tl.pointer_type(tl.float32)), mask=stored_N, other=0.0)
            for token in range(tl.maximum(low, begin), end):
                score_N = tl.zeros((BLOCK_N,), tl.float32)
                for h in tl.static_range(0, HEADS, BLOCK_H):
                    head_H = h + tl.arange(0, BLOCK_H)
                    at_H = (wide + token) * HEADS + head_H
                    q_HD = tl.load(
                        q_ptr + at_H[:, None] * WIDTH + width_D[None, :],
                        mask=(head_H < HEADS)[:, None] & (width_D < WIDTH)[None, :],
                        other=0.0,
                    )
                    w_H = tl.load(w_ptr + at_H, mask=head_H < HEADS, other=0.0)
                    dot_NH = tl.dot(key_ND, tl.trans(q_HD))
                    score_N += tl.sum(tl.maximum(dot_NH, 0.0) * w_H[None, :], axis=1)
                if PACKED:
                    score_N = score_N * scale_N
                seen_N = entry_N < (token + shift) // ratio
                tl.store(score_ptr + (wide + token - first_token) * columns + entry_N, score_N, mask=seen_N)
