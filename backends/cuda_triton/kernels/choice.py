"""The exact k largest scores of each row, ties to the lowest column: largest scores of groups first, then inside the chosen groups only.

Of groups of G neighbouring columns, ordered by their largest score (equal ones: the lower group first), the first k hold all of the k
largest scores: in front of a column of any other group stand the largest scores of k groups. So a row is read once, for its groups'
largest scores ("peaks"), and again only in k groups. With peaks of peaks, L levels of them, nothing but the first reading grows with N:

    bytes of a row = 4 N (1 + 1/G + ... + 1/G^L + 1/G^L)   read once; every level of peaks is written, and the last one read
                   + 4 k (L + 1 + L + L G)                 every choice writes k indices; those below read them and G values for each

G = 8, k = 512, at 3.35 TB/s:

    rows x N        levels   bytes      us of memory   of that the scores themselves
    4096 x 32768    1        763 MB     228            537 MB, 160 us
    128 x 262144    2        161 MB      48            134 MB,  40 us
    1 x 1048576     3        4.9 MB     1.5            4.2 MB, 1.3 us
    128 x 8192      0        4.5 MB     1.3            4.2 MB, 1.3 us

Beside memory stand L + 1 choices one after the other. A round of one is 78 instructions for each of 8 warps (4096 values), 160 clocks of a
multiprocessor, and some 20 are needed: 2 to 4 us where each row has a multiprocessor; at 4096 rows, 31 a multiprocessor, 100 to 150 us in all,
as far as they do not run beside memory. So 230 to 380, 55 to 65, 12 to 20 and 3 to 5 us are expected.

Rows that a machine works on at a time, and peaks above all, stay in its L2 of 50 MB, so less than this comes from memory.

The k-th largest of the values that a program holds is found by halving the interval of integers that order as the scores do. It begins
at the threshold of the level above, which k groups reach, and ends as soon as a threshold cuts off k values exactly.

Shapes: E values of a program, G columns of a group, k chosen, C columns.
"""

import triton
import triton.language as tl

from backends.cuda_triton.kernels.paged import token_place

_LOWEST = tl.constexpr(-2147483648)
_HIGHEST = tl.constexpr(2147483647)


@triton.jit
def _ordered(score: tl.tensor) -> tl.tensor:
    """Integers that order as the scores do, 0 and -0 alike."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, _LOWEST - bits, bits)


@triton.jit
def peaks(
    value_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    first_token: tl.tensor,
    batch: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    peak_pitch: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    ratio: tl.tensor,
    LEVELS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Largest ordered values of the groups of BLOCK_E values (program_id(0)) of one token (program_id(1)), LEVELS levels of 1 to 3.

    Value i stands for SPAN of the row's columns from i * SPAN and counts where the first of them is visible; with SPAN 1 values are scores
    fp32, otherwise peaks. Rows of values have `pitch` columns, a multiple of GROUP. A row of peaks has `peak_pitch`: the first level begins
    at 0, the others at `second` and `third`. Groups without a value that counts are not written.
    """
    line = tl.program_id(1)
    base = tl.program_id(0) * BLOCK_E
    _, position = token_place(first_token + line, cu_ptr, start_ptr, batch, BATCH)
    visible = (tl.minimum((position + 1) // ratio, columns) + SPAN - 1) // SPAN
    if base < visible:
        group_P = base + tl.arange(0, BLOCK_E // GROUP) * GROUP
        at_PG = group_P[:, None] + tl.arange(0, GROUP)[None, :]
        # a group is read whole or not at all, so that a thread reads 16 bytes at a time
        value_PG = tl.load(value_ptr + line.to(tl.int64) * pitch + at_PG, mask=(group_P < visible)[:, None], other=0)
        if SPAN == 1:
            value_PG = _ordered(value_PG)
        peak_P = tl.max(tl.where(at_PG < visible, value_PG, _LOWEST), axis=1)
        row_ptr = peak_ptr + line.to(tl.int64) * peak_pitch
        tl.store(row_ptr + group_P // GROUP, peak_P, mask=group_P < visible)
        if LEVELS > 1:
            group_S = base + tl.arange(0, BLOCK_E // GROUP // GROUP) * (GROUP * GROUP)
            peak_S = tl.max(tl.reshape(peak_P, (BLOCK_E // GROUP // GROUP, GROUP)), axis=1)
            tl.store(row_ptr + second + group_S // (GROUP * GROUP), peak_S, mask=group_S < visible)
            if LEVELS > 2:
                group_U = base + tl.arange(0, BLOCK_E // GROUP // GROUP // GROUP) * (GROUP * GROUP * GROUP)
                peak_U = tl.max(tl.reshape(peak_S, (BLOCK_E // GROUP // GROUP // GROUP, GROUP)), axis=1)
                tl.store(row_ptr + third + group_U // (GROUP * GROUP * GROUP), peak_U, mask=group_U < visible)


@triton.jit
def choose(
    value_ptr: tl.tensor,
    group_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_token: tl.tensor,
    batch: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    topk: tl.tensor,
    ratio: tl.tensor,
    SPAN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The topk largest values of one token (program_id(0)), rising indices int32 into its row, -1 behind the last.

    Value i stands for SPAN columns from i * SPAN and counts where the first of them is visible. FIRST: the row's first BLOCK_E values take
    part; otherwise GROUP values for each index that the level above has written to `group`. LAST: values are scores fp32, otherwise peaks.
    `bound` int32: a threshold that topk values reach, from the level above and for the next.
    """
    line = tl.program_id(0)
    _, position = token_place(first_token + line, cu_ptr, start_ptr, batch, BATCH)
    visible = tl.minimum((position + 1) // ratio, columns)
    place_E = tl.arange(0, BLOCK_E)
    if FIRST:
        item_E = place_E
        valid_E = item_E * SPAN < visible
    else:
        from_E = place_E // GROUP
        group_E = tl.load(group_ptr + line.to(tl.int64) * topk + from_E, mask=from_E < topk, other=-1)
        item_E = group_E * GROUP + place_E % GROUP
        valid_E = (group_E >= 0) & (item_E * SPAN < visible)
    key_E = tl.load(value_ptr + line.to(tl.int64) * pitch + item_E, mask=valid_E, other=0)
    if LAST:
        key_E = _ordered(key_E)
    # the interval that holds the threshold; what does not count is below all that does, which is never the lowest integer
    low = tl.min(tl.where(valid_E, key_E, _HIGHEST), axis=0)
    key_E = tl.where(valid_E, key_E, _LOWEST)
    high = tl.max(key_E, axis=0)
    if not FIRST:
        low = tl.maximum(low, tl.load(bound_ptr + line))
    reach = tl.sum((key_E >= low).to(tl.int32), axis=0)
    wanted = tl.minimum(topk, reach)
    # `low` is reached by `wanted` values at least, `high` + 1 by fewer
    while (low < high) & (reach != wanted):
        # the mean, rounded up, without overflow
        middle = (low | high) - ((low ^ high) >> 1)
        found = tl.sum((key_E >= middle).to(tl.int32), axis=0)
        enough = found >= wanted
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, found, reach)
        high = tl.where(enough, high, middle - 1)
    above_E = key_E > low
    level_E = key_E == low
    short = wanted - tl.sum(above_E.to(tl.int32), axis=0)
    # both counts in one scan: no more than 2^15 values
    before_E = tl.cumsum(above_E.to(tl.int32) + (level_E.to(tl.int32) << 16), axis=0)
    before_level_E = before_E >> 16
    taken_E = above_E | (level_E & (before_level_E <= short))
    to_E = (before_E & 0xFFFF) + tl.minimum(before_level_E, short) - 1
    row_ptr = out_ptr + line.to(tl.int64) * topk
    tl.store(row_ptr + to_E, item_E, mask=taken_E)
    rest_K = tl.arange(0, BLOCK_K)
    tl.store(row_ptr + rest_K, tl.full((BLOCK_K,), -1, tl.int32), mask=(rest_K >= wanted) & (rest_K < topk))
    if not LAST:
        tl.store(bound_ptr + line, tl.where(wanted == topk, low, _LOWEST))
