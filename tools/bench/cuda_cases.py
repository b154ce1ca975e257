"""Calls that the CUDA bench times: V4-Flash widths, decode of 1 to 128 requests and prefill, by context.

Shapes: T tokens, B sequences, H heads, C head width, D hidden, n streams, R2 rotary pairs, P rows per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
POOL_BYTES = 1 << 28
"""Size of a cache at most, several times that of an L2: sequences of long contexts draw their blocks from one pool."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement. make(g): a fresh set of inputs.

    part(inputs, tokens): the same call for a few of its tokens, on the host, and how to take their results from those of the whole
    call; None where the kernel has to run the part anew (an op that writes to its arguments).
    """

    op: str
    name: str
    tokens: int
    make: Callable[[torch.Generator], Inputs]
    part: Callable[[Inputs, Sequence[int]], tuple[Inputs, Callable[[Any], list[Tensor]] | None]]
    prefill: bool
    compiled: bool


@dataclass(frozen=True)
class Widths:
    """Sizes of a model that its calls depend on."""

    hidden: int = 4096
    heads: int = 64
    channels: int = 512
    pairs: int = 32
    window: int = 128
    topk: int = 512
    streams: int = 4
    index_heads: int = 64
    index_width: int = 128
    experts: int = 256
    active: int = 6
    inner: int = 2048


FLASH = Widths()
TINY = Widths(
    hidden=64, heads=4, channels=32, pairs=4, window=8, topk=16, index_heads=4, index_width=32, experts=4, active=2, inner=32
)


def host(value: Any) -> Any:
    """A tensor on the CPU; other values as they are."""
    return value.cpu() if isinstance(value, Tensor) else value


def outputs(found: Any) -> list[Tensor]:
    """The results of a call as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def by_row(indexed: Sequence[int]) -> Callable[..., Any]:
    """Part of a call whose arguments `indexed` have a row per token, as its outputs have."""

    def part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
        rows = list(tokens)
        args = tuple(host(a[rows] if i in indexed else a) for i, a in enumerate(inputs.args))
        return Inputs(args, dict(inputs.kwargs)), lambda found: [f[rows].cpu() for f in outputs(found)]

    return part


def randn(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers where the generator is."""
    return torch.randn(*shape, generator=g, device=g.device, dtype=torch.float32).to(dtype)


def _angles(g: torch.Generator, tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(tokens, pairs, generator=g, device=g.device) * 1e4
    return angle.cos(), angle.sin()


def rowwise(w: Widths, tokens: int, prefill: bool) -> Iterator[Case]:
    """Norms, rotations, hyper-connections and cache writes of `tokens` tokens."""

    def case(op: str, make: Callable[[torch.Generator], Inputs], indexed: Sequence[int]) -> Case:
        return Case(op, f"{op} T={tokens}", tokens, make, by_row(indexed), prefill, tokens != 32)

    eps = {"eps": 1e-6}
    fp32 = torch.float32
    hc = {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": 20}
    mixes, wide = (2 + w.streams) * w.streams, w.streams * w.hidden
    yield case("rms_norm", lambda g: Inputs((randn(g, tokens, w.hidden), randn(g, w.hidden)), eps), (0,))
    yield case(
        "add_rms_norm",
        lambda g: Inputs((randn(g, tokens, w.hidden), randn(g, tokens, w.hidden), randn(g, w.hidden)), eps),
        (0, 1),
    )
    yield case(
        "q_norm_rope",
        lambda g: Inputs((randn(g, tokens, w.heads, w.channels), *_angles(g, tokens, w.pairs)), eps),
        (0, 1, 2),
    )
    yield case(
        "rope",
        lambda g: Inputs((randn(g, tokens, w.heads, w.channels), *_angles(g, tokens, w.pairs)), {"inverse": True}),
        (0, 1, 2),
    )
    yield case(
        "hc_pre",
        lambda g: Inputs(
            (
                randn(g, tokens, w.streams, w.hidden),
                randn(g, mixes, wide, dtype=fp32) * wide**-0.5,
                randn(g, 3, dtype=fp32).abs(),
                randn(g, mixes, dtype=fp32),
            ),
            hc,
        ),
        (0,),
    )
    yield case(
        "hc_post",
        lambda g: Inputs(
            (
                randn(g, tokens, w.hidden),
                randn(g, tokens, w.streams, w.hidden),
                randn(g, tokens, w.streams, dtype=fp32).sigmoid(),
                randn(g, tokens, w.streams, w.streams, dtype=fp32).softmax(-1),
            ),
            {},
        ),
        (0, 1, 2, 3),
    )


def pool(g: torch.Generator, batch: int, rows: int, make: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """A cache and its table: every sequence has `rows` rows in blocks drawn from a pool of at most POOL_BYTES."""
    each = max(-(-rows // BLOCK), 1)
    one = make(1)
    blocks = min(batch * each, POOL_BYTES // (one.numel() * one.element_size())) + 1
    table = torch.randint(1, blocks, (batch, each), generator=g, device=g.device, dtype=torch.int32)
    if batch * each < blocks:
        table = (torch.randperm(batch * each, generator=g, device=g.device).view(batch, each) + 1).int()
    return make(blocks), table


def batch_of(g: torch.Generator, batch: int, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens and start_pos: `tokens` new tokens a sequence, the last of which sees `context` tokens."""
    cu = torch.arange(batch + 1, dtype=torch.int32, device=g.device) * tokens
    start = torch.full((batch,), context - tokens, dtype=torch.int32, device=g.device)
    return cu, start


def single(cu: Tensor, start: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The same tokens as sequences of one token each: offsets, positions, and the sequence each belonged to."""
    ends, starts = cu[1:].tolist(), start.tolist()
    owner = [next(b for b, end in enumerate(ends) if t < end) for t in tokens]
    positions = [starts[b] + t - int(cu[b]) for b, t in zip(owner, tokens, strict=True)]
    offsets = torch.arange(len(tokens) + 1, dtype=torch.int32)
    return offsets, torch.tensor(positions, dtype=torch.int32), owner
