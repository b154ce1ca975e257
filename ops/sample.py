"""Choosing the next token: greedy, or drawn from the temperature / top-k / top-p distribution with a given uniform number.

Drawing is deterministic given `uniform`, so every backend can be judged: the token drawn must be the one whose interval of
the cumulative distribution holds the number, up to the rounding error of that distribution.

Shapes: logits [B, V], everything else [B].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

_SHAPES = {"zero": (0, 16), "one": (1, 16), "odd": (3, 37), "single": (2, 1), "many": (17, 101), "flash": (2, 129280)}


def _check_logits(op: str, logits_BV: Tensor) -> None:
    if not logits_BV.is_floating_point():
        raise ValueError(f"{op}: logits are {logits_BV.dtype}, expected a floating type")
    if logits_BV.dim() != 2 or logits_BV.shape[1] < 1:
        raise ValueError(f"{op}: logits have shape {tuple(logits_BV.shape)}, expected [B, V] with V >= 1")


# ---- argmax ---------------------------------------------------------------------------------------------------------


def _argmax(logits_BV: Tensor, *, compute: torch.dtype = torch.float32) -> Tensor:
    """Index of the largest logit of each row; equal logits: the lowest index.

    logits_BV [B, V] any float type. Returns int64 [B]. Source: specification section 2.1, step 6, decoded greedily.
    ValueError for other shapes and types.
    """
    vocab = logits_BV.shape[1]
    largest_BV = logits_BV == logits_BV.amax(-1, keepdim=True)
    return torch.where(largest_BV, torch.arange(vocab), vocab).amin(-1)


def _argmax_meta(logits_BV: Tensor) -> Tensor:
    _check_logits("argmax", logits_BV)
    return torch.empty(logits_BV.shape[:1], dtype=torch.int64, device="meta")


def _argmax_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in _SHAPES.items():
        yield Sample(name, (torch.randn(shape, generator=g).to(dtype),), {}, (name,))
    yield Sample("ties", (torch.randint(0, 3, (9, 40), generator=g).to(dtype),), {}, ("ties",))
    yield Sample("equal", (torch.zeros(2, 129, dtype=dtype),), {}, ("ties",))
    yield Sample("negative", ((-0.5 - torch.rand(5, 100, generator=g)).to(dtype),), {}, ("negative",))
    yield Sample("close", ((10 + 1e-3 * torch.randn(9, 300, generator=g)).to(dtype),), {}, ("close",))
    masked = torch.randn(6, 70, generator=g).masked_fill(torch.rand(6, 70, generator=g) < 0.9, -torch.inf)
    yield Sample("masked", (masked.to(dtype),), {}, ("masked",))
    for vocab in (37, 129280):
        late = torch.randn(2, vocab, generator=g)
        late[0, -1], late[1, -2] = 9, 9
        yield Sample(f"late-{vocab}", (late.to(dtype),), {}, ("late",))


def _argmax_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("vector", (torch.zeros(4, dtype=dtype),), {}, r"logits have shape \(4,\), expected \[B, V\]")
    yield WrongInput("empty", (torch.zeros(4, 0, dtype=dtype),), {}, r"expected \[B, V\] with V >= 1")
    yield WrongInput("integer", (torch.zeros(2, 4, dtype=torch.int32),), {}, r"logits are torch.int32")


argmax = Contract(
    name="argmax",
    reference=_argmax,
    meta=_argmax_meta,
    samples=_argmax_samples,
    errors=_argmax_errors,
    bound=lambda logits_BV, *, golden, found: (None,),
    cost=lambda logits_BV: Cost(0, logits_BV.numel(), tensors_bytes(logits_BV), 8 * logits_BV.shape[0], "fp32"),
)


# ---- sample ---------------------------------------------------------------------------------------------------------


def _distribution(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, compute: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Tokens kept by top-k in order, their cumulative probabilities, and how many of them top-p keeps."""
    ordered, order = torch.sort(logits_V, descending=True, stable=True)
    if top_k > 0:
        ordered, order = ordered[:top_k], order[:top_k]
    # the largest logit is taken off before the division: a tiny temperature then gives -inf, never inf - inf
    cumulative = torch.softmax((ordered.to(compute) - ordered[0].to(compute)) / temperature, 0).cumsum(0)
    if top_p >= 1:
        return order, cumulative, len(order)
    kept = int(torch.searchsorted(cumulative, torch.tensor(top_p, dtype=compute))) + 1
    return order, cumulative, min(kept, len(order))


def _sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    uniform_B: Tensor,
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """One token per row by inversion of the cumulative distribution, likeliest tokens first.

    Tokens are ordered by descending logit (equal logits: ascending index). top_k > 0 keeps the first top_k; their probabilities
    are the fp32 softmax of (logits - largest) / temperature; top_p keeps the shortest prefix whose probability reaches top_p,
    at least one token; the token drawn is the first whose cumulative probability, renormalised over the kept ones, exceeds
    uniform. Temperature 0: the largest logit. logits_BV [B, V] any float type; temperature_B fp32 [B], >= 0; top_k_B int32 [B],
    0 = all; top_p_B fp32 [B], >= 1 = all; uniform_B fp32 [B] in [0, 1). Returns int64 [B].
    Source: temperature and top-p of specification section 1.1. ValueError for other shapes and types.
    """
    tokens = []
    rows = zip(logits_BV, temperature_B.tolist(), top_k_B.tolist(), top_p_B.tolist(), uniform_B.tolist(), strict=True)
    for logits_V, temperature, top_k, top_p, uniform in rows:
        if temperature == 0:
            tokens.append(_argmax(logits_V[None])[0])
            continue
        order, cumulative, kept = _distribution(logits_V, temperature, top_k, top_p, compute)
        place = int(torch.searchsorted(cumulative, uniform * cumulative[kept - 1], right=True))
        tokens.append(order[min(place, kept - 1)])
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64)


def _sample_meta(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    _check_logits("sample", logits_BV)
    rows = logits_BV.shape[:1]
    for name, value, dtype in (
        ("temperature", temperature_B, torch.float32),
        ("top_k", top_k_B, torch.int32),
        ("top_p", top_p_B, torch.float32),
        ("uniform", uniform_B, torch.float32),
    ):
        if value.shape != rows or value.dtype != dtype:
            raise ValueError(
                f"sample: {name} is {value.dtype} {tuple(value.shape)}, expected {dtype} ({rows[0]},), "
                "one value per row of logits"
            )
    return torch.empty(rows, dtype=torch.int64, device="meta")


def _row_complaint(token: int, logits_V: Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> str | None:
    if not 0 <= token < len(logits_V):
        return f"token {token} is outside 0..{len(logits_V) - 1}"
    if temperature == 0:
        best = int(_argmax(logits_V[None])[0])
        return None if token == best else f"found token {token}, expected {best}, the largest logit (temperature 0)"
    order, cumulative, _ = _distribution(logits_V, temperature, top_k, top_p, torch.float64)
    place = (order == token).nonzero()
    if not len(place):
        return f"token {token} is not among the top {top_k}"
    i = int(place[0])
    # sums of V terms that add up to 1, here and in the renormalisation; exp of a rounded z errs by 2u|z| of its value
    p = cumulative.diff(prepend=cumulative.new_zeros(1))
    scaled = ((logits_V.double().max() - logits_V[order].double()) / temperature).clamp_max(100)
    slack = 2 * float(bounds.accumulate(len(order), torch.ones(())) + bounds.roundoff(torch.float32) * (scaled * p).sum())
    low = float(cumulative[i - 1]) if i else 0.0
    if top_p < 1 and low > top_p + slack:
        return f"token {token} starts at probability {low:.9g}, beyond top_p {top_p:.9g}"
    # the kept mass lies between those of the prefixes that reach top_p less and more the slack
    ends = torch.tensor([top_p - slack, top_p + slack], dtype=torch.float64)
    least, most = (float(cumulative[int(k)]) for k in torch.searchsorted(cumulative, ends).clamp(max=len(order) - 1))
    high = float(cumulative[i])
    if low - slack <= uniform * most and uniform * least <= high + slack:
        return None
    return f"token {token} covers {low:.9g}..{high:.9g} of a mass of {least:.9g}, which does not hold uniform {uniform:.9g}"


def _sample_bound(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    uniform_B: Tensor,
    *,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Callable[[Tensor], str | None]]:
    columns = (temperature_B.tolist(), top_k_B.tolist(), top_p_B.tolist(), uniform_B.tolist())

    def judge_tokens(tokens_B: Tensor) -> str | None:
        for row, (token, logits_V, *rest) in enumerate(zip(tokens_B.tolist(), logits_BV, *columns, strict=True)):
            if complaint := _row_complaint(token, logits_V, *rest):
                return f"row {row}: {complaint}"
        return None

    return (judge_tokens,)


def _parameters(rows: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows cycle through greedy, plain, top-k, top-p and both, at cold and warm temperatures."""
    index = torch.arange(rows)
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7, 0.8])[index % 5]
    top_k = torch.tensor([0, 0, 5, 0, 12, 1, 3000], dtype=torch.int32)[index % 7]
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.0, 0.95])[index % 6]
    return temperature, top_k, top_p, torch.rand(rows, generator=g)


def _sample_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in _SHAPES.items():
        logits = (2 * torch.randn(shape, generator=g)).to(dtype)
        yield Sample(name, (logits, *_parameters(shape[0], g)), {}, (name,))
    logits = torch.randint(0, 3, (35, 24), generator=g).to(dtype)
    yield Sample("ties", (logits, *_parameters(35, g)), {}, ("ties",))
    edges = torch.tensor([0.0, 0.0, 1 - 2.0**-24, 1 - 2.0**-24, 0.5])
    logits = torch.randn(5, 50, generator=g).to(dtype)
    top_k, top_p = torch.tensor([0, 3, 0, 3, 0], dtype=torch.int32), torch.tensor([1.0, 1.0, 1.0, 0.8, 0.6])
    yield Sample("edges", (logits, torch.ones(5), top_k, top_p, edges), {}, ("edges",))
    ones, off = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    uniform = torch.tensor([0.0, 0.3, 0.77, 0.9999])
    yield Sample("flat", (torch.zeros(4, 5000, dtype=dtype), ones, off, ones, uniform), {}, ("flat",))
    logits, both = torch.randn(64, 40, generator=g).to(dtype), torch.full((64,), 8, dtype=torch.int32)
    numbers = torch.rand(64, generator=g)
    yield Sample("top-k-and-p", (logits, torch.full((64,), 1.7), both, torch.full((64,), 0.8), numbers), {}, ("both",))
    # numbers just beside the border between two tokens, where coarse probabilities choose the other one
    logits = torch.randn(64, 50, generator=g).to(dtype)
    ends = logits.double().sort(descending=True, stable=True).values.softmax(-1).cumsum(-1)
    borders = ends[torch.arange(64), torch.randint(0, 30, (64,), generator=g)] + 3e-5 * torch.randn(64, generator=g).sign()
    yield Sample(
        "borders", (logits, torch.ones(64), torch.zeros(64, dtype=torch.int32), torch.ones(64), borders.float()), {}, ("borders",)
    )
    yield Sample("cold", (torch.randn(4, 300, generator=g).to(dtype), ones * 1e-30, off, ones, uniform), {}, ("cold",))


def _sample_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    logits, f, k = torch.zeros(2, 8, dtype=dtype), torch.ones(2), torch.zeros(2, dtype=torch.int32)
    yield WrongInput(
        "temperature-length", (logits, f[:1], k, f, f * 0), {}, r"temperature is torch.float32 \(1,\), expected .*\(2,\)"
    )
    yield WrongInput("top-k-type", (logits, f, k.long(), f, f * 0), {}, r"top_k is torch.int64 \(2,\), expected torch.int32")
    yield WrongInput("top-p-type", (logits, f, k, f.double(), f * 0), {}, r"top_p is torch.float64")
    yield WrongInput("uniform-length", (logits, f, k, f, f[:1]), {}, r"uniform is torch.float32 \(1,\)")
    yield WrongInput("vector", (logits[0], f, k, f, f * 0), {}, r"logits have shape \(8,\)")


def _sample_cost(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Cost:
    read = tensors_bytes(logits_BV, temperature_B, top_k_B, top_p_B, uniform_B)
    return Cost(0, 6 * logits_BV.numel(), read, 8 * logits_BV.shape[0], "fp32")


sample = Contract(
    name="sample",
    reference=_sample,
    meta=_sample_meta,
    samples=_sample_samples,
    errors=_sample_errors,
    bound=_sample_bound,
    cost=_sample_cost,
    choices=(0,),
)
