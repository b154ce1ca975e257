"""Hyper-connections: the mixes as a product split over the streams' channels, coefficients with Sinkhorn, and mixing back.

Shapes: T tokens of a program, n streams, D hidden, K = nD the flattened streams, N mixes padded to a power of two, S splits of K.
"""

import triton
import triton.language as tl


@triton.jit
def mixes(
    streams_ptr: tl.tensor,
    fn_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    tokens: tl.tensor,
    wide: tl.tensor,
    count: tl.tensor,
    chunk: tl.tensor,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    MIXES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """partial[s, t, :count] = f_t fn^T over the s-th chunk of channels, partial[s, t, count] = sum of squares there.

    fn is fp32: beside bf16 streams it is cut into three bf16 terms, which hold its 24 bits, so that the products are exact.
    """
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    mix_N = tl.arange(0, MIXES)
    start_T = token_T.to(tl.int64) * wide
    acc_TN = tl.zeros((TOKENS, MIXES), tl.float32)
    square_T = tl.zeros((TOKENS,), tl.float32)
    first = split * chunk
    for k in range(first, min(first + chunk, wide), BLOCK):
        channel_K = k + tl.arange(0, BLOCK)
        f_TK = tl.load(
            streams_ptr + start_T[:, None] + channel_K[None, :],
            mask=(token_T < tokens)[:, None] & (channel_K < wide)[None, :],
            other=0.0,
        )
        fn_KN = tl.load(
            fn_ptr + mix_N[None, :] * wide + channel_K[:, None],
            mask=(mix_N < count)[None, :] & (channel_K < wide)[:, None],
            other=0.0,
        )
        if BF16:
            high_KN = fn_KN.to(tl.bfloat16)
            rest_KN = fn_KN - high_KN.to(tl.float32)
            middle_KN = rest_KN.to(tl.bfloat16)
            low_KN = (rest_KN - middle_KN.to(tl.float32)).to(tl.bfloat16)
            acc_TN = tl.dot(f_TK, low_KN, acc_TN)
            acc_TN = tl.dot(f_TK, middle_KN, acc_TN)
            acc_TN = tl.dot(f_TK, high_KN, acc_TN)
        else:
            acc_TN = tl.dot(f_TK, fn_KN, acc_TN, input_precision="ieee")
        wide_TK = f_TK.to(tl.float32)
        square_T += tl.sum(wide_TK * wide_TK, axis=1)
    acc_TN = tl.where((mix_N == count)[None, :], square_T[:, None], acc_TN)
    at_TN = (split.to(tl.int64) * tokens + token_T)[:, None] * MIXES + mix_N[None, :]
    tl.store(partial_ptr + at_TN, acc_TN, mask=(token_T < tokens)[:, None])


@triton.jit
def _mix(partial_ptr: tl.tensor, offset: tl.tensor, token: tl.tensor, tokens: tl.tensor, splits: tl.tensor, MIXES: tl.constexpr,
         SPLITS: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:  # fmt: skip
    """SIZE neighbouring mixes of one token from column `offset` on, summed over the splits in order of a tree."""
    split_S = tl.arange(0, SPLITS)
    at_SN = (split_S.to(tl.int64) * tokens + token)[:, None] * MIXES + (offset + tl.arange(0, SIZE))[None, :]
    return tl.sum(tl.load(partial_ptr + at_SN, mask=(split_S < splits)[:, None], other=0.0), axis=0)


@triton.jit
def collapse(
    streams_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    base_ptr: tl.tensor,
    x_ptr: tl.tensor,
    post_ptr: tl.tensor,
    comb_ptr: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    splits: tl.tensor,
    norm_eps: tl.tensor,
    hc_eps: tl.tensor,
    iters: tl.tensor,
    HEAD: tl.constexpr,
    STREAMS: tl.constexpr,
    MIXES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x of one token (program_id(0)) and one block of channels (program_id(1)); the first block also stores post and comb."""
    token = tl.program_id(0).to(tl.int64)
    stream_n = tl.arange(0, STREAMS)
    square = tl.sum(_mix(partial_ptr, count, token, tokens, splits, MIXES, SPLITS, 1), axis=0)
    inverse = tl.rsqrt(square / (STREAMS * width) + norm_eps)
    mix_n = _mix(partial_ptr, 0, token, tokens, splits, MIXES, SPLITS, STREAMS) * inverse
    pre_n = tl.sigmoid(mix_n * tl.load(scale_ptr) + tl.load(base_ptr + stream_n)) + hc_eps
    if not HEAD and tl.program_id(1) == 0:
        mix_n = _mix(partial_ptr, STREAMS, token, tokens, splits, MIXES, SPLITS, STREAMS) * inverse
        post_n = 2 * tl.sigmoid(mix_n * tl.load(scale_ptr + 1) + tl.load(base_ptr + STREAMS + stream_n))
        tl.store(post_ptr + token * STREAMS + stream_n, post_n)
        pair_nn = stream_n[:, None] * STREAMS + stream_n[None, :]
        mix_nn = tl.reshape(
            _mix(partial_ptr, 2 * STREAMS, token, tokens, splits, MIXES, SPLITS, STREAMS * STREAMS), (STREAMS, STREAMS)
        )
        logit_nn = mix_nn * inverse * tl.load(scale_ptr + 2) + tl.load(base_ptr + 2 * STREAMS + pair_nn)
        p_nn = tl.exp(logit_nn - tl.max(logit_nn, axis=1)[:, None])
        p_nn = p_nn / tl.sum(p_nn, axis=1)[:, None] + hc_eps
        p_nn = p_nn / (tl.sum(p_nn, axis=0)[None, :] + hc_eps)
        for _ in range(iters - 1):
            p_nn = p_nn / (tl.sum(p_nn, axis=1)[:, None] + hc_eps)
            p_nn = p_nn / (tl.sum(p_nn, axis=0)[None, :] + hc_eps)
        tl.store(comb_ptr + token * STREAMS * STREAMS + pair_nn, p_nn)
    channel_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_D = channel_D < width
    x_D = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(STREAMS):
        pre = tl.sum(tl.where(stream_n == j, pre_n, 0.0), axis=0)
        stream_D = tl.load(streams_ptr + (token * STREAMS + j) * width + channel_D, mask=inside_D, other=0.0)
        x_D += pre * stream_D.to(tl.float32)
    tl.store(x_ptr + token * width + channel_D, x_D.to(x_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def mix_back(
    y_ptr: tl.tensor,
    streams_ptr: tl.tensor,
    post_ptr: tl.tensor,
    comb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """X'_k = post_k y + sum_j comb[j, k] X_j for one token and one block of channels; every input is read once."""
    token = tl.program_id(0).to(tl.int64)
    channel_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_D = channel_D < width
    stream_n = tl.arange(0, STREAMS)
    post_n = tl.load(post_ptr + token * STREAMS + stream_n)
    y_D = tl.load(y_ptr + token * width + channel_D, mask=inside_D, other=0.0).to(tl.float32)
    acc_nD = post_n[:, None] * y_D[None, :]
    for j in tl.static_range(STREAMS):
        comb_n = tl.load(comb_ptr + (token * STREAMS + j) * STREAMS + stream_n)
        stream_D = tl.load(streams_ptr + (token * STREAMS + j) * width + channel_D, mask=inside_D, other=0.0)
        acc_nD += comb_n[:, None] * stream_D.to(tl.float32)[None, :]
    at_nD = (token * STREAMS + stream_n)[:, None] * width + channel_D[None, :]
    tl.store(out_ptr + at_nD, acc_nD.to(out_ptr.dtype.element_ty), mask=inside_D[None, :])
