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

Beside memory stand L + 1 choices one after the other, of some 7 rounds at the highest level and 5 below where scores are normal (counted in a
simulation; halving the interval takes 19 and 11).

Rows that a machine works on at a time, and peaks above all, stay in its L2 of 50 MB, so less than this comes from memory.

The k-th largest of the values that a program holds is found by narrowing an interval of integers that order as the scores do. It begins
at the threshold of the level above, which k groups reach, and ends as soon as a threshold cuts off k values exactly. One program goes
through all levels of its row: the length of the row is looked up once, and the threshold and the largest value stay in registers. The highest
level begins at the smallest of the largest keys of fours.

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
    EAGER: tl.constexpr,
) -> None:
    """Largest ordered values of the groups of BLOCK_E values (program_id(0)) of one token (program_id(1)), LEVELS levels of 1 to 3.

    Value i stands for SPAN of the row's columns from i * SPAN and counts where the first of them is visible; with SPAN 1 values are scores
    fp32, otherwise peaks. Rows of values have `pitch` columns, a multiple of GROUP. A row of peaks has `peak_pitch`: the first level begins
    at 0, the others at `second` and `third`. Groups without a value that counts are not written.
    EAGER: values are read before the row's length is known.
    """
    line = tl.program_id(1)
    base = tl.program_id(0) * BLOCK_E
    group_P = base + tl.arange(0, BLOCK_E // GROUP) * GROUP
    at_PG = group_P[:, None] + tl.arange(0, GROUP)[None, :]
    value_ptr += line.to(tl.int64) * pitch
    # a group is read whole or not at all, so that a thread reads 16 bytes at a time
    if EAGER:
        early_PG = tl.load(value_ptr + at_PG, mask=(group_P * SPAN < columns)[:, None], other=0)
    _, position = token_place(first_token + line, cu_ptr, start_ptr, batch, BATCH)
    visible = (tl.minimum((position + 1) // ratio, columns) + SPAN - 1) // SPAN
    if base < visible:
        value_PG = early_PG if EAGER else tl.load(value_ptr + at_PG, mask=(group_P < visible)[:, None], other=0)
        key_PG = _ordered(value_PG) if SPAN == 1 else value_PG
        peak_P = tl.max(tl.where(at_PG < visible, key_PG, _LOWEST), axis=1)
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
def _peaks_at(columns: tl.tensor, LEVEL: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Where a level of peaks begins in a row of them: every level is padded to 16 values."""
    at = columns * 0
    for _ in tl.static_range(1, LEVEL):
        columns = tl.cdiv(columns, GROUP)
        at += tl.cdiv(columns, 16) * 16
    return at


@triton.jit
def _threshold(key_E: tl.tensor, low: tl.tensor, high: tl.tensor, wanted: tl.tensor, reach: tl.tensor) -> tl.tensor:
    """(threshold that `wanted` keys reach, keys that reach it, keys above the interval that was left).

    `low` is reached by `wanted` keys or more, by `reach` at most, and `high` is the largest. Two thresholds are counted a round: on both
    sides of where the wanted key lies if keys are spread evenly between `low` and `high`, as far apart as chance asks for; after a round
    that has not halved the keys in between, at thirds of the interval. It ends at a threshold that exactly `wanted` keys reach or at one
    integer.
    """
    over = wanted * 0
    even = over == 0
    while (low < high) & (reach != wanted):
        span = high.to(tl.int64) - low
        inside = (reach - over).to(tl.float32)
        part = (wanted - over).to(tl.float32) / inside
        spread = tl.sqrt(part * (1 - part) / inside) + 0.25 / inside
        width = span.to(tl.float32)
        near = (tl.where(even, part - spread, 1.0 / 3) * width).to(tl.int64)
        far = (tl.where(even, part + spread, 2.0 / 3) * width).to(tl.int64)
        upper = (high + 1 - tl.minimum(tl.maximum(near, 1), span)).to(tl.int32)
        lower = (high + 1 - tl.minimum(tl.maximum(far, 1), span)).to(tl.int32)
        # both counts in one sum: no more than 2^15 keys
        found = tl.sum((key_E >= upper).to(tl.int32) + ((key_E >= lower).to(tl.int32) << 16), axis=0)
        found_upper, found_lower = found & 0xFFFF, (found >> 16) & 0xFFFF
        is_upper, is_lower = found_upper >= wanted, found_lower >= wanted
        high = tl.where(is_upper, high, tl.where(is_lower, upper, lower) - 1)
        over = tl.where(is_upper, over, tl.where(is_lower, found_upper, found_lower))
        low = tl.where(is_upper, upper, tl.where(is_lower, lower, low))
        reach = tl.where(is_upper, found_upper, tl.where(is_lower, found_lower, reach))
        even = (reach - over).to(tl.float32) * 2 <= inside
    return low, reach, over


@triton.jit
def _values(
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    columns: tl.tensor,
    item_E: tl.tensor,
    read_E: tl.tensor,
    LEVEL: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Ordered values of a level of the row at which the pointers are."""
    if LEVEL == 0:
        key_E = _ordered(tl.load(score_ptr + item_E, mask=read_E, other=0))
    else:
        key_E = tl.load(peak_ptr + _peaks_at(columns, LEVEL, GROUP) + item_E, mask=read_E, other=0)
    return key_E


@triton.jit
def _settle(
    target_ptr: tl.tensor,
    key_E: tl.tensor,
    item_E: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    reach: tl.tensor,
    topk: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Write the items of the topk largest keys, rising, -1 behind the last; the threshold that topk keys reach."""
    wanted = tl.minimum(topk, reach)
    low, reach, over = _threshold(key_E, low, high, wanted, reach)
    above_E = key_E > low
    level_E = key_E == low
    # all that equal the threshold, or the lowest of them
    short = tl.where(reach == wanted, BLOCK_E, wanted - over)
    # both counts in one scan
    before_E = tl.cumsum(above_E.to(tl.int32) + (level_E.to(tl.int32) << 16), axis=0)
    before_level_E = (before_E >> 16) & 0xFFFF
    taken_E = above_E | (level_E & (before_level_E <= short))
    to_E = (before_E & 0xFFFF) + tl.minimum(before_level_E, short) - 1
    tl.store(target_ptr + to_E, item_E, mask=taken_E)
    rest_K = tl.arange(0, BLOCK_K)
    tl.store(target_ptr + rest_K, tl.full((BLOCK_K,), -1, tl.int32), mask=(rest_K >= wanted) & (rest_K < topk))
    return tl.where(wanted == topk, low, _LOWEST + 1)


@triton.jit
def choose(
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    passed_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_token: tl.tensor,
    batch: tl.tensor,
    columns: tl.tensor,
    pitch: tl.tensor,
    peak_pitch: tl.tensor,
    topk: tl.tensor,
    ratio: tl.tensor,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EAGER: tl.constexpr,
) -> None:
    """The topk largest scores of one token (program_id(0)), rising columns int32, -1 behind the last.

    From the highest of LEVELS levels of peaks down to the scores: of the highest the first BLOCK_TOP values take part, of the others GROUP
    values for each index that the level above has left in `passed` int32 [T, LEVELS, topk]. Value i of level l stands for GROUP^l columns
    from i * GROUP^l and counts where the first of them is visible. EAGER: the highest level is read before the row's length is known.
    """
    SPAN: tl.constexpr = GROUP**LEVELS
    line = tl.program_id(0)
    score_ptr += line.to(tl.int64) * pitch
    peak_ptr += line.to(tl.int64) * peak_pitch
    passed_ptr += line.to(tl.int64) * LEVELS * topk
    out_ptr += line.to(tl.int64) * topk
    first_F = tl.arange(0, BLOCK_TOP)
    if EAGER:
        key_F = _values(score_ptr, peak_ptr, columns, first_F, first_F * SPAN < columns, LEVELS, GROUP)
    _, position = token_place(first_token + line, cu_ptr, start_ptr, batch, BATCH)
    visible = tl.minimum((position + 1) // ratio, columns)
    if not EAGER:
        key_F = _values(score_ptr, peak_ptr, columns, first_F, first_F * SPAN < visible, LEVELS, GROUP)
    valid_F = first_F * SPAN < visible
    # what does not count is below all that does, which is never the lowest integer
    key_F = tl.where(valid_F, key_F, _LOWEST)
    # of k groups or more every one has a key that reaches the smallest of their largest: far better than the smallest key
    peak_Q = tl.max(tl.reshape(key_F, (BLOCK_TOP // 4, 4)), axis=1)
    count = (visible + SPAN - 1) // SPAN
    low = tl.min(tl.where(peak_Q > _LOWEST, peak_Q, _HIGHEST), axis=0)
    low = tl.where((count + 3) // 4 >= topk, low, _LOWEST + 1)
    # the largest peak is the largest score
    high = tl.max(peak_Q, axis=0)
    target_ptr = out_ptr if LEVELS == 0 else passed_ptr + (LEVELS - 1) * topk
    low = _settle(target_ptr, key_F, first_F, low, high, count, topk, BLOCK_TOP, BLOCK_K)
    place_E = tl.arange(0, BLOCK_E)
    from_E = place_E // GROUP
    for i in tl.static_range(1, LEVELS + 1):
        # the indices that other threads of this program have passed on
        tl.debug_barrier()
        group_E = tl.load(passed_ptr + (LEVELS - i) * topk + from_E, mask=from_E < topk, other=-1)
        item_E = group_E * GROUP + place_E % GROUP
        valid_E = (group_E >= 0) & (item_E * (GROUP ** (LEVELS - i)) < visible)
        key_E = _values(score_ptr, peak_ptr, columns, item_E, valid_E, LEVELS - i, GROUP)
        key_E = tl.where(valid_E, key_E, _LOWEST)
        reach = tl.sum((key_E >= low).to(tl.int32), axis=0)
        next_ptr = out_ptr if i == LEVELS else passed_ptr + (LEVELS - i - 1) * topk
        low = _settle(next_ptr, key_E, item_E, low, high, reach, topk, BLOCK_E, BLOCK_K)
