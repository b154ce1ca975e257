"""Manifold-constrained hyper-connections: collapse the streams, mix them back, collapse them for the head.

Shapes: T tokens, n streams, D hidden; fn [(2+n)n, nD], the nD axis stream-major; rows 0..n-1 pre, n..2n-1 post, then comb (j, k)
row-major.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes


def _mixes(streams: Tensor, fn: Tensor, norm_eps: float, compute: torch.dtype) -> Tensor:
    f = streams.flatten(1).to(compute)
    return (f @ fn.to(compute).T) * torch.rsqrt(f.square().mean(-1, keepdim=True) + norm_eps)


def sinkhorn(logits_Tnn: Tensor, eps: float, iters: int) -> Tensor:
    """softmax over the last axis + eps, columns, then iters-1 times rows and columns; every divisor + eps; ends on columns."""
    p = torch.softmax(logits_Tnn, dim=-1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return p


def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Coefficients and sublayer input of one hyper-connection, fp32.

    u = (f fn^T) rsqrt(mean(f^2) + norm_eps) with f the flattened streams; pre = sigmoid(u0*scale0 + base0) + hc_eps;
    post = 2 sigmoid(u1*scale1 + base1); comb = sinkhorn(u2*scale2 + base2); x = sum_j pre_j X_j.
    streams [T, n, D] float; fn fp32 [(2+n)n, nD]; scale fp32 [3]; base fp32 [(2+n)n]. Returns x [T, D] in the streams' type,
    post fp32 [T, n], comb fp32 [T, n, n]. Source: specification section 3. ValueError for other shapes.
    """
    n = streams_TnD.shape[1]
    u = _mixes(streams_TnD, fn, norm_eps, compute)
    s, b = scale.to(compute), base.to(compute)
    pre = torch.sigmoid(u[:, :n] * s[0] + b[:n]) + hc_eps
    post = 2 * torch.sigmoid(u[:, n : 2 * n] * s[1] + b[n : 2 * n])
    comb = sinkhorn((u[:, 2 * n :] * s[2] + b[2 * n :]).view(-1, n, n), hc_eps, iters)
    return (pre[:, :, None] * streams_TnD.to(compute)).sum(1), post, comb


def _check(op: str, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rows: int, scales: int) -> None:
    if streams.dim() != 3 or not streams.is_floating_point():
        raise ValueError(f"{op}: streams is {streams.dtype} {tuple(streams.shape)}, expected float [T, n, D]")
    wide = streams.shape[1] * streams.shape[2]
    expected = {"fn": (fn, (rows, wide)), "scale": (scale, (scales,)), "base": (base, (rows,))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.float32 {shape}")


def _pre_meta(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = streams_TnD.shape[1] if streams_TnD.dim() == 3 else 0
    _check("hc_pre", streams_TnD, fn, scale, base, (2 + n) * n, 3)
    if iters < 1:
        raise ValueError(f"hc_pre: iters is {iters}, expected at least 1")
    t, _, d = streams_TnD.shape
    return (
        torch.empty(t, d, dtype=streams_TnD.dtype, device="meta"),
        torch.empty(t, n, device="meta"),
        torch.empty(t, n, n, device="meta"),
    )


_SHAPES = {
    "zero": (0, 4, 32),
    "one": (1, 4, 64),
    "odd": (5, 4, 23),
    "two": (3, 2, 16),
    "many": (300, 4, 8),
    "flash": (2, 4, 4096),
    "pro": (1, 4, 7168),
}


def _parameters(n: int, d: int, rows: int, scales: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    fn = torch.randn(rows, n * d, generator=g) * (n * d) ** -0.5
    return fn, 0.5 + torch.rand(scales, generator=g), torch.randn(rows, generator=g)


def _pre_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    eps = {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": 20}
    for name, (t, n, d) in _SHAPES.items():
        for tag, size in (("unit", 1.0), ("tiny", 2e-3), ("huge", 1e3)):
            x = (torch.randn(t, n, d, generator=g) * size).to(dtype)
            yield Sample(f"{name}-{tag}", (x, *_parameters(n, d, (2 + n) * n, 3, g)), eps, (name, tag))
    x = torch.randn(3, 1, 16, generator=g).to(dtype).repeat(1, 4, 1)
    fn, scale, base = _parameters(4, 16, 24, 3, g)
    yield Sample("equal-streams", (x, fn, scale, base), eps, ("constant",))
    yield Sample("steep", (x, fn * 8, scale, base * 4), eps, ("outliers",))
    yield Sample("one-iteration", (x, fn, scale, base), {**eps, "iters": 1}, ())


def _pre_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, kw = torch.zeros(2, 4, 8, dtype=dtype), {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": 20}
    fn, scale, base = torch.zeros(24, 32), torch.zeros(3), torch.zeros(24)
    yield WrongInput("fn", (x, fn[:8], scale, base), kw, r"fn is torch.float32 \(8, 32\), expected torch.float32 \(24, 32\)")
    yield WrongInput("scale", (x, fn, scale[:1], base), kw, r"scale is torch.float32 \(1,\)")
    yield WrongInput("flat", (x.flatten(1), fn, scale, base), kw, r"expected float \[T, n, D\]")
    yield WrongInput("iters", (x, fn, scale, base), {**kw, "iters": 0}, r"iters is 0")


def _mix_error(streams: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Mixes u and their fp32 error: a sum of nD products, scaled by the inverse norm."""
    f = streams.flatten(1).double()
    inverse = torch.rsqrt(f.square().mean(-1, keepdim=True) + norm_eps)
    u = (f @ fn.double().T) * inverse
    error = bounds.accumulate(f.shape[1], (f.abs() @ fn.double().abs().T) * inverse)
    return u, error + 16 * bounds.roundoff(torch.float32) * u.abs()


def _pre_bound(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int,
    golden: tuple[Tensor, ...], found: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, u32 = streams_TnD.shape[1], bounds.roundoff(torch.float32)
    u, error = _mix_error(streams_TnD, fn, norm_eps)
    s, b = scale.double(), base.double().abs()

    def logit_error(rows: slice, k: int) -> Tensor:
        return error[:, rows] * s[k].abs() + 4 * u32 * (u[:, rows].abs() * s[k].abs() + b[rows])

    # sigmoid has slope 1/4; softmax and the normalisations move each entry by at most its relative logit error, twice over
    pre_error = logit_error(slice(0, n), 0) / 4 + 4 * u32
    post_error = logit_error(slice(n, 2 * n), 1) / 2 + 8 * u32
    comb_logit = logit_error(slice(2 * n, None), 2).view(-1, n, n)
    spread = comb_logit.amax((-1, -2), keepdim=True)
    comb_error = golden[2] * (2 * n * spread + 4 * (2 * iters + 2) * n * u32) + 4 * u32
    x = streams_TnD.double().abs()
    return (pre_error[:, :, None] * x).sum(1) + 8 * u32 * x.sum(1) * 2, post_error, comb_error


hc_pre = Contract(
    name="hc_pre",
    reference=_hc_pre,
    meta=_pre_meta,
    samples=_pre_samples,
    errors=_pre_errors,
    bound=_pre_bound,
    cost=lambda streams_TnD, fn, scale, base, *, norm_eps, hc_eps, iters: Cost(
        2 * streams_TnD.shape[0] * fn.numel(),
        4 * streams_TnD.numel() + streams_TnD.shape[0] * streams_TnD.shape[1] ** 2 * (4 * iters + 4),
        tensors_bytes(streams_TnD, fn, scale, base),
        tensors_bytes(streams_TnD) // streams_TnD.shape[1]
        + 4 * streams_TnD.shape[0] * (streams_TnD.shape[1] + 1) * streams_TnD.shape[1],
        "fp32",
    ),
)


def _hc_post(
    y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor, *, compute: torch.dtype = torch.float32
) -> Tensor:
    """X'_k = post_k y + sum_j comb[j, k] X_j, fp32, one rounding; comb is contracted over its FIRST index.

    y [T, D] and streams [T, n, D] of one float type; post fp32 [T, n]; comb fp32 [T, n, n]. Returns [T, n, D] in that type.
    Source: specification section 3. ValueError for other shapes.
    """
    mixed = comb_Tnn.to(compute).transpose(1, 2) @ streams_TnD.to(compute)
    return post_Tn.to(compute)[:, :, None] * y_TD.to(compute)[:, None] + mixed


def _post_meta(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    if streams_TnD.dim() != 3 or not streams_TnD.is_floating_point():
        raise ValueError(f"hc_post: streams is {streams_TnD.dtype} {tuple(streams_TnD.shape)}, expected float [T, n, D]")
    t, n, d = streams_TnD.shape
    if tuple(y_TD.shape) != (t, d) or y_TD.dtype != streams_TnD.dtype:
        raise ValueError(f"hc_post: y is {y_TD.dtype} {tuple(y_TD.shape)}, expected {streams_TnD.dtype} {(t, d)}")
    for name, tensor, shape in (("post", post_Tn, (t, n)), ("comb", comb_Tnn, (t, n, n))):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"hc_post: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.float32 {shape}")
    return torch.empty(t, n, d, dtype=streams_TnD.dtype, device="meta")


def _post_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (t, n, d) in _SHAPES.items():
        for tag, size in (("unit", 1.0), ("huge", 1e3)):
            x, y = ((torch.randn(*s, generator=g) * size).to(dtype) for s in ((t, n, d), (t, d)))
            comb = sinkhorn(torch.randn(t, n, n, generator=g), 1e-6, 20)
            yield Sample(f"{name}-{tag}", (y, x, 2 * torch.rand(t, n, generator=g), comb), {}, (name, tag))


def _post_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, y, p, c = torch.zeros(2, 4, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype), torch.zeros(2, 4), torch.zeros(2, 4, 4)
    yield WrongInput("comb", (y, x, p, c[:, :2]), {}, r"comb is torch.float32 \(2, 2, 4\), expected torch.float32 \(2, 4, 4\)")
    yield WrongInput("y", (y[:1], x, p, c), {}, r"y is .* \(1, 8\), expected")
    yield WrongInput("bf16-post", (y, x, p.bfloat16(), c), {}, r"post is torch.bfloat16")


def _post_bound(
    y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor, *,
    golden: tuple[Tensor, ...], found: tuple[Tensor, ...],
) -> tuple[Tensor]:  # fmt: skip
    y, x = y_TD.double().abs(), streams_TnD.double().abs()
    total = post_Tn.double().abs()[:, :, None] * y[:, None] + comb_Tnn.double().abs().transpose(1, 2) @ x
    return (bounds.accumulate(x.shape[1] + 1, total),)


hc_post = Contract(
    name="hc_post",
    reference=_hc_post,
    meta=_post_meta,
    samples=_post_samples,
    errors=_post_errors,
    bound=_post_bound,
    cost=lambda y_TD, streams_TnD, post_Tn, comb_Tnn: Cost(
        0,
        2 * streams_TnD.numel() * (streams_TnD.shape[1] + 1),
        tensors_bytes(y_TD, streams_TnD, post_Tn, comb_Tnn),
        tensors_bytes(streams_TnD),
        "fp32",
    ),
)


def _hc_head(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x = sum_j pre_j X_j with pre = sigmoid(u*scale + base) + hc_eps, u as in hc_pre; fp32, one rounding.

    streams [T, n, D] float; fn fp32 [n, nD]; scale fp32 [1]; base fp32 [n]. Returns [T, D] in the streams' type.
    Source: specification section 3. ValueError for other shapes.
    """
    u = _mixes(streams_TnD, fn, norm_eps, compute)
    pre = torch.sigmoid(u * scale.to(compute) + base.to(compute)) + hc_eps
    return (pre[:, :, None] * streams_TnD.to(compute)).sum(1)


def _head_meta(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    _check("hc_head", streams_TnD, fn, scale, base, streams_TnD.shape[1] if streams_TnD.dim() == 3 else 0, 1)
    return torch.empty(streams_TnD.shape[0], streams_TnD.shape[2], dtype=streams_TnD.dtype, device="meta")


def _head_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (t, n, d) in _SHAPES.items():
        for tag, size in (("unit", 1.0), ("tiny", 2e-3), ("huge", 1e3)):
            x = (torch.randn(t, n, d, generator=g) * size).to(dtype)
            yield Sample(f"{name}-{tag}", (x, *_parameters(n, d, n, 1, g)), {"norm_eps": 1e-6, "hc_eps": 1e-6}, (name, tag))


def _head_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, kw = torch.zeros(2, 4, 8, dtype=dtype), {"norm_eps": 1e-6, "hc_eps": 1e-6}
    fn, scale, base = torch.zeros(4, 32), torch.zeros(1), torch.zeros(4)
    yield WrongInput("fn", (x, fn.repeat(6, 1), scale, base), kw, r"fn is .*\(24, 32\), expected .*\(4, 32\)")
    yield WrongInput("scale", (x, fn, scale.repeat(3), base), kw, r"scale is .*\(3,\), expected .*\(1,\)")


def _head_bound(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float,
    golden: tuple[Tensor, ...], found: tuple[Tensor, ...],
) -> tuple[Tensor]:  # fmt: skip
    u32 = bounds.roundoff(torch.float32)
    u, error = _mix_error(streams_TnD, fn, norm_eps)
    logit = error * scale.double().abs() + 4 * u32 * (u.abs() * scale.double().abs() + base.double().abs())
    x = streams_TnD.double().abs()
    return (((logit / 4 + 4 * u32)[:, :, None] * x).sum(1) + 16 * u32 * x.sum(1),)


hc_head = Contract(
    name="hc_head",
    reference=_hc_head,
    meta=_head_meta,
    samples=_head_samples,
    errors=_head_errors,
    bound=_head_bound,
    cost=lambda streams_TnD, fn, scale, base, *, norm_eps, hc_eps: Cost(
        2 * streams_TnD.shape[0] * fn.numel(),
        4 * streams_TnD.numel(),
        tensors_bytes(streams_TnD, fn, scale, base),
        tensors_bytes(streams_TnD) // streams_TnD.shape[1],
        "fp32",
    ),
)
