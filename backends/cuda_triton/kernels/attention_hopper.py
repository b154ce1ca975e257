"""Attention over placed rows with layouts chosen by hand (Gluon): the same sums as kernels/attention.py, 64 heads and 512 channels a program.

Triton gives a product whose result feeds another one a single column of warps: with 64 heads both groups of four warps then compute all scores,
and with its pipeline the next rows are asked for only after the scores of this step. Here each group computes half of the scores, and a tile of
rows is asked for as soon as the product before has left its buffer, a whole step ahead.

Shapes: H heads of a program, C channels, N rows of a step, T tokens, L places listed for a token.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _rows(
    unit_ptr: gl.tensor,
    window_ptr: gl.tensor,
    cmp_ptr: gl.tensor,
    step: gl.tensor,
    entries: gl.tensor,
    rows: gl.tensor,
    spare: gl.tensor,
    UNIT: gl.constexpr,
    N: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    """Pointers to the rows [N] of a step; a row that is not there is replaced by `spare`, a row of the window, and gets no weight."""
    place_N = step * N + gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    unit_N = gl.load(unit_ptr + place_N, mask=place_N < rows, other=-1)
    row_N = gl.where((place_N < entries) & (unit_N >= 0), cmp_ptr, window_ptr)
    return row_N + gl.where(unit_N >= 0, unit_N, spare).to(gl.int64) * UNIT


@gluon.jit
def _ask(tile: gl.shared_memory_descriptor, row_N: gl.tensor, C: gl.constexpr, LAYOUT: gl.constexpr) -> None:
    """Begin to copy rows [N, C]."""
    channel_C = gl.arange(0, C, gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(tile, row_N[:, None] + channel_C[None, :])
    async_copy.commit_group()


@gluon.jit
def attend_placed(
    q_ptr: gl.tensor,
    window_ptr: gl.tensor,
    cmp_ptr: gl.tensor,
    unit_ptr: gl.tensor,
    rows_ptr: gl.tensor,
    sink_ptr: gl.tensor,
    out_ptr: gl.tensor,
    heads: gl.tensor,
    length: gl.tensor,
    scale: gl.tensor,
    UNIT: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
) -> None:
    """One token (program_id(0)) and H heads (1): out bf16 [T, heads, C] over the rows that `places` has written to `unit` [T, L].

    `rows` [T, 2]: entries in front of the token's window, and rows in all.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    token = gl.program_id(0)
    entries = gl.load(rows_ptr + token * 2)
    rows = gl.load(rows_ptr + token * 2 + 1)
    unit_ptr += token.to(gl.int64) * length
    # a token's window begins with a row that is there
    spare = gl.load(unit_ptr + entries)
    q_ptr += (token.to(gl.int64) * heads + gl.program_id(1) * H) * C
    out_ptr += (token.to(gl.int64) * heads + gl.program_id(1) * H) * C
    q_HC = gl.allocate_shared_memory(gl.bfloat16, [H, C], SHARED)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, N, C], SHARED)
    at_HC = gl.arange(0, H, gl.SliceLayout(1, ROWS))[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, ROWS))[None, :]
    async_copy.async_copy_global_to_shared(q_HC, q_ptr + at_HC)
    _ask(tiles.index(0), _rows(unit_ptr, window_ptr, cmp_ptr, 0, entries, rows, spare, UNIT, N, ROWS), C, ROWS)
    _ask(tiles.index(1), _rows(unit_ptr, window_ptr, cmp_ptr, 1, entries, rows, spare, UNIT, N, ROWS), C, ROWS)
    scale = scale * _LOG2E
    top_H = gl.full([H], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    mass_H = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc_HC = gl.zeros([H, C], gl.float32, SUMS)
    for i in range(0, gl.cdiv(rows, N)):
        tile = tiles.index(i % 2)
        # the copies of this step by all threads, seen by the products
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()
        logit_HN = warpgroup_mma(q_HC, tile.permute((1, 0)), gl.zeros([H, N], gl.float32, SCORES), use_acc=False, is_async=True)
        place_N = i * N + gl.arange(0, N, gl.SliceLayout(0, SCORES))
        unit_N = gl.load(unit_ptr + place_N, mask=place_N < rows, other=-1)
        logit_HN = warpgroup_mma_wait(0, deps=[logit_HN])
        logit_HN = gl.where((unit_N >= 0)[None, :], logit_HN * scale, float("-inf"))
        higher_H = gl.maximum(top_H, gl.max(logit_HN, axis=1))
        weight_HN = gl.exp2(logit_HN - higher_H[:, None])
        shrink_H = gl.exp2(top_H - higher_H)
        mass_H = mass_H * shrink_H + gl.sum(weight_HN, axis=1)
        top_H = higher_H
        weight_HN = gl.convert_layout(weight_HN.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2))
        acc_HC = acc_HC * gl.convert_layout(shrink_H, gl.SliceLayout(1, SUMS))[:, None]
        acc_HC = warpgroup_mma(weight_HN, tile, acc_HC, is_async=True)
        # looked up while the product runs
        row_N = _rows(unit_ptr, window_ptr, cmp_ptr, i + 2, entries, rows, spare, UNIT, N, ROWS)
        acc_HC = warpgroup_mma_wait(0, deps=[acc_HC])
        # both groups have read the tile
        gl.thread_barrier()
        _ask(tile, row_N, C, ROWS)
    async_copy.wait_group(0)
    sink_H = gl.load(sink_ptr + gl.program_id(1) * H + gl.arange(0, H, gl.SliceLayout(1, SCORES))) * _LOG2E
    higher_H = gl.maximum(top_H, sink_H)
    shrink_H = gl.exp2(top_H - higher_H)
    shrink_H = shrink_H / (mass_H * shrink_H + gl.exp2(sink_H - higher_H))
    out_HC = acc_HC * gl.convert_layout(shrink_H, gl.SliceLayout(1, SUMS))[:, None]
    to_HC = gl.arange(0, H, gl.SliceLayout(1, SUMS))[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(out_ptr + to_HC, out_HC.to(gl.bfloat16))


@gluon.jit
def attend_ahead(
    q_ptr: gl.tensor,
    window_ptr: gl.tensor,
    cmp_ptr: gl.tensor,
    unit_ptr: gl.tensor,
    rows_ptr: gl.tensor,
    sink_ptr: gl.tensor,
    out_ptr: gl.tensor,
    heads: gl.tensor,
    length: gl.tensor,
    scale: gl.tensor,
    UNIT: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
) -> None:
    """As attend_placed, with the scores of the next step under way while this step's become weights: four smaller tiles."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(2 * N, 16, 2)
    token = gl.program_id(0)
    entries = gl.load(rows_ptr + token * 2)
    rows = gl.load(rows_ptr + token * 2 + 1)
    unit_ptr += token.to(gl.int64) * length
    # a token's window begins with a row that is there
    spare = gl.load(unit_ptr + entries)
    q_ptr += (token.to(gl.int64) * heads + gl.program_id(1) * H) * C
    out_ptr += (token.to(gl.int64) * heads + gl.program_id(1) * H) * C
    q_HC = gl.allocate_shared_memory(gl.bfloat16, [H, C], SHARED)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [4, N, C], SHARED)
    weights = gl.allocate_shared_memory(gl.bfloat16, [H, N], WEIGHTS)
    at_HC = gl.arange(0, H, gl.SliceLayout(1, ROWS))[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, ROWS))[None, :]
    async_copy.async_copy_global_to_shared(q_HC, q_ptr + at_HC)
    for k in gl.static_range(3):
        _ask(tiles.index(k), _rows(unit_ptr, window_ptr, cmp_ptr, k, entries, rows, spare, UNIT, N, ROWS), C, ROWS)
    scale = scale * _LOG2E
    top_H = gl.full([H], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    mass_H = gl.full([H], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc_HC = gl.zeros([H, C], gl.float32, SUMS)
    async_copy.wait_group(2)
    fence_async_shared()
    gl.thread_barrier()
    logit_HN = warpgroup_mma(q_HC, tiles.index(0).permute((1, 0)), gl.zeros([H, N], gl.float32, SCORES), use_acc=False, is_async=True)
    logit_HN = warpgroup_mma_wait(0, deps=[logit_HN])
    for i in range(0, gl.cdiv(rows, N)):
        # of the steps asked for, up to i + 2, only the last may still be on its way
        async_copy.wait_group(1)
        fence_async_shared()
        gl.thread_barrier()
        after = tiles.index((i + 1) % 4)
        next_HN = warpgroup_mma(q_HC, after.permute((1, 0)), gl.zeros([H, N], gl.float32, SCORES), use_acc=False, is_async=True)
        # the tile of the step before this one has been read by both groups
        _ask(tiles.index((i + 3) % 4), _rows(unit_ptr, window_ptr, cmp_ptr, i + 3, entries, rows, spare, UNIT, N, ROWS), C, ROWS)
        place_N = i * N + gl.arange(0, N, gl.SliceLayout(0, SCORES))
        unit_N = gl.load(unit_ptr + place_N, mask=place_N < rows, other=-1)
        logit_HN = gl.where((unit_N >= 0)[None, :], logit_HN * scale, float("-inf"))
        higher_H = gl.maximum(top_H, gl.max(logit_HN, axis=1))
        weight_HN = gl.exp2(logit_HN - higher_H[:, None])
        shrink_H = gl.exp2(top_H - higher_H)
        weights.store(weight_HN.to(gl.bfloat16))
        mass_H = mass_H * shrink_H + gl.sum(weight_HN, axis=1)
        top_H = higher_H
        acc_HC = acc_HC * gl.convert_layout(shrink_H, gl.SliceLayout(1, SUMS))[:, None]
        fence_async_shared()
        gl.thread_barrier()
        acc_HC = warpgroup_mma(weights, tiles.index(i % 4), acc_HC, is_async=True)
        logit_HN, acc_HC = warpgroup_mma_wait(0, deps=[next_HN, acc_HC])
    async_copy.wait_group(0)
    sink_H = gl.load(sink_ptr + gl.program_id(1) * H + gl.arange(0, H, gl.SliceLayout(1, SCORES))) * _LOG2E
    higher_H = gl.maximum(top_H, sink_H)
    shrink_H = gl.exp2(top_H - higher_H)
    shrink_H = shrink_H / (mass_H * shrink_H + gl.exp2(sink_H - higher_H))
    out_HC = acc_HC * gl.convert_layout(shrink_H, gl.SliceLayout(1, SUMS))[:, None]
    to_HC = gl.arange(0, H, gl.SliceLayout(1, SUMS))[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(out_ptr + to_HC, out_HC.to(gl.bfloat16))
