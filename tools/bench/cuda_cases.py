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
POOL = 1 << 18
"""Rows of a cache at most: sequences of long contexts draw their blocks from one pool."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement. make(g): a fresh set of inputs; part(inputs, tokens): the same call for a few of its tokens, on the host."""

    op: str
    name: str
    tokens: int
    make: Callable[[torch.Generator], Inputs]
    part: Callable[[Inputs, Sequence[int]], tuple[Inputs, Callable[[Any], list[Tensor]]]]
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


def _host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def by_row(indexed: Sequence[int]) -> Callable[..., Any]:
    """Part of a call whose arguments `indexed` have a row per token, as its outputs have."""

    def part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
        rows = list(tokens)
        args = tuple(_host(a[rows] if i in indexed else a) for i, a in enumerate(inputs.args))
        return Inputs(args, dict(inputs.kwargs)), lambda found: [f[rows].cpu() for f in _outputs(found)]

    return part


def _randn(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
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
    yield case("rms_norm", lambda g: Inputs((_randn(g, tokens, w.hidden), _randn(g, w.hidden)), eps), (0,))
    yield case(
        "add_rms_norm",
        lambda g: Inputs((_randn(g, tokens, w.hidden), _randn(g, tokens, w.hidden), _randn(g, w.hidden)), eps),
        (0, 1),
    )
    yield case(
        "q_norm_rope",
        lambda g: Inputs((_randn(g, tokens, w.heads, w.channels), *_angles(g, tokens, w.pairs)), eps),
        (0, 1, 2),
    )
    yield case(
        "rope",
        lambda g: Inputs((_randn(g, tokens, w.heads, w.channels), *_angles(g, tokens, w.pairs)), {"inverse": True}),
        (0, 1, 2),
    )
    yield case(
        "hc_pre",
        lambda g: Inputs(
            (
                _randn(g, tokens, w.streams, w.hidden),
                _randn(g, mixes, wide, dtype=fp32) * wide**-0.5,
                _randn(g, 3, dtype=fp32).abs(),
                _randn(g, mixes, dtype=fp32),
            ),
            hc,
        ),
        (0,),
    )
    yield case(
        "hc_post",
        lambda g: Inputs(
            (
                _randn(g, tokens, w.hidden),
                _randn(g, tokens, w.streams, w.hidden),
                _randn(g, tokens, w.streams, dtype=fp32).sigmoid(),
                _randn(g, tokens, w.streams, w.streams, dtype=fp32).softmax(-1),
            ),
            {},
        ),
        (0, 1, 2, 3),
    )


def pool(g: torch.Generator, batch: int, rows: int, make: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """A cache and its table: every sequence has `rows` rows in blocks drawn from a pool of at most POOL rows."""
    each = max(-(-rows // BLOCK), 1)
    blocks = min(batch * each, POOL // BLOCK) + 1
    table = torch.randint(1, blocks, (batch, each), generator=g, device=g.device, dtype=torch.int32)
    if batch * each < blocks:
        table = (torch.randperm(batch * each, generator=g, device=g.device).view(batch, each) + 1).int()
    return make(blocks), table


def _batch(g: torch.Generator, batch: int, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens and start_pos: `tokens` new tokens a sequence, the last of which sees `context` tokens."""
    cu = torch.arange(batch + 1, dtype=torch.int32, device=g.device) * tokens
    start = torch.full((batch,), context - tokens, dtype=torch.int32, device=g.device)
    return cu, start


def _single(cu: Tensor, start: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The same tokens as sequences of one token each: offsets, positions, and the sequence each belonged to."""
    ends, starts = cu[1:].tolist(), start.tolist()
    owner = [next(b for b, end in enumerate(ends) if t < end) for t in tokens]
    positions = [starts[b] + t - int(cu[b]) for b, t in zip(owner, tokens, strict=True)]
    offsets = torch.arange(len(tokens) + 1, dtype=torch.int32)
    return offsets, torch.tensor(positions, dtype=torch.int32), owner


def attention_part(inputs: Inputs, tokens: Sequence[int]) -> tuple[Inputs, Callable[[Any], list[Tensor]]]:
    """A few queries of a call of sparse_attention."""
    q, cache, table, sink, cu, start = inputs.args
    offsets, positions, owner = _single(cu, start, tokens)
    kwargs = {k: _host(v) for k, v in inputs.kwargs.items()}
    if "cmp_table" in kwargs:
        kwargs["cmp_table"] = kwargs["cmp_table"][owner]
    if "cmp_index" in kwargs:
        kwargs["cmp_index"] = kwargs["cmp_index"][list(tokens)]
    args = (q[list(tokens)].cpu(), cache.cpu(), table[owner].cpu(), sink.cpu(), offsets, positions)
    return Inputs(args, kwargs), lambda found: [found[list(tokens)].cpu()]


def attention(w: Widths, kind: str, batch: int, new: int, context: int, packed: bool = False) -> Case:
    """Window only ("swa"), chosen entries ("csa", ratio 4) or all entries ("hca", ratio 128)."""
    ratio = {"swa": 0, "csa": 4, "hca": 128}[kind]
    if w is TINY and ratio:
        ratio = {4: 2, 128: 4}[ratio]
    tokens = batch * new

    def rows(g: torch.Generator) -> Callable[[int], Tensor]:
        if not packed:
            return lambda blocks: _randn(g, blocks, BLOCK, w.channels)
        from backends.cuda_triton.attention import row_bytes

        return lambda blocks: _packed_rows(g, blocks, w.channels, 2 * w.pairs, row_bytes(w.channels, 2 * w.pairs))

    def make(g: torch.Generator) -> Inputs:
        cache, table = pool(g, batch, context, rows(g)) if context <= 4096 else _window_pool(g, batch, new, context, w.window, rows(g))
        cu, start = _batch(g, batch, new, context)
        kwargs: dict[str, Any] = {"scale": w.channels**-0.5, "window": w.window}
        if ratio:
            entries = max(context // ratio, 1)
            kwargs["cmp_cache"], kwargs["cmp_table"] = pool(g, batch, entries, rows(g))
            kwargs["ratio"] = ratio
        if kind == "csa":
            seen = torch.arange(context - new, context, device=g.device).repeat(batch).add(1) // ratio
            score = torch.rand(tokens, entries, generator=g, device=g.device) if tokens * entries <= 1 << 28 else None
            kwargs["cmp_index"] = _chosen(g, seen, min(w.topk, entries), score, w.topk)
        return Inputs((_randn(g, tokens, w.heads, w.channels), cache, table, _randn(g, w.heads, dtype=torch.float32), cu, start), kwargs)

    name = f"{kind}{' packed' if packed else ''} {'prefill' if new > 1 else 'decode'} T={tokens} context={context}"
    return Case("sparse_attention", name, tokens, make, attention_part, new > 1, False)


def _packed_rows(g: torch.Generator, blocks: int, channels: int, rotary: int, width: int) -> Tensor:
    """Packed rows of random finite values: e4m3 codes, bf16 channels near 1 and scales near 1."""
    cache = torch.randint(0, 120, (blocks, BLOCK * width), generator=g, device=g.device, dtype=torch.uint8)
    values = channels + rotary
    rotary_part = cache[:, : BLOCK * values].view(blocks, BLOCK, values)[:, :, channels - rotary :]
    ones = _randn(g, blocks, BLOCK, rotary)
    rotary_part.copy_(ones.view(torch.uint8))
    cache[:, BLOCK * values :] = torch.randint(118, 122, (blocks, BLOCK * (width - values)), generator=g, device=g.device, dtype=torch.uint8)
    return cache.view(blocks, BLOCK, width)


def _window_pool(
    g: torch.Generator, batch: int, new: int, context: int, window: int, make: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """A window cache of a long context: blocks behind the window of the first new token are not stored."""
    each = -(-context // BLOCK)
    first = max(context - new - window, 0) // BLOCK
    stored = each - first
    table = torch.zeros(batch, each, dtype=torch.int32, device=g.device)
    table[:, first:] = (torch.randperm(batch * stored, generator=g, device=g.device).view(batch, stored) + 1).int()
    return make(batch * stored + 1), table


def _chosen(g: torch.Generator, seen_T: Tensor, k: int, score_TN: Tensor | None, width: int) -> Tensor:
    """Random distinct visible entries of every token, -1 behind the last."""
    tokens = seen_T.shape[0]
    index = torch.full((tokens, width), -1, dtype=torch.int32, device=g.device)
    if score_TN is None:
        # every token sees far more than it takes: one stride per token gives distinct entries without drawing for each
        step = (seen_T // k).clamp(min=1)
        index[:, :k] = (torch.arange(k, device=g.device)[None, :] * step[:, None] + step[:, None] // 2).int()
        return index
    hidden = torch.arange(score_TN.shape[1], device=g.device)[None, :] >= seen_T[:, None]
    value, best = score_TN.masked_fill(hidden, -1.0).topk(k)
    index[:, :k] = torch.where(value >= 0, best, -1).int()
    return index


def cases(w: Widths, dry: bool) -> list[Case]:
    """Every measurement."""
    if dry:
        return [
            *rowwise(w, 3, False),
            *rowwise(w, 5, True),
            *(attention(w, kind, 2, 1, 40) for kind in ("swa", "csa", "hca")),
            attention(w, "csa", 1, 5, 40),
            attention(w, "csa", 1, 3, 6000),
            attention(w, "csa", 2, 1, 40, packed=True),
        ]
    found = [c for tokens in (1, 32, 128, 4096) for c in rowwise(w, tokens, tokens > 1000)]
    for batch in (1, 32, 128):
        found += [attention(w, "swa", batch, 1, 4096), attention(w, "csa", batch, 1, 4096), attention(w, "csa", batch, 1, 131072)]
        found += [attention(w, "hca", batch, 1, 131072), attention(w, "csa", batch, 1, 131072, packed=True)]
    found += [attention(w, kind, 1, 1, 1048576) for kind in ("csa", "hca")]
    found += [attention(w, kind, 1, 4096, context) for kind in ("swa", "csa", "hca") for context in (4096, 131072)]
    return found
