"""The compressor op against its contract, an independent formula, and the properties an incremental state must keep.

T tokens, D hidden, m ratio, c entry width, w = 2c with overlap, else c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import backends.cpu.compress  # noqa: F401  (registers the implementation)
from ops.bounds import roundoff
from ops.compress import compress
from ops.contract import Sample
from ops.judge import judge

CPU = compress.impls["cpu"].fn
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-6


@dataclass
class Layer:
    """Weights of one compressor and one paged state; block 0 is null and full of nan."""

    ratio: int
    c: int
    wkv: Tensor
    wgate: Tensor
    ape: Tensor
    norm: Tensor
    state: Tensor
    rotary: int = 4

    @classmethod
    def random(
        cls, *, ratio: int = 4, overlap: bool = True, c: int = 8, hidden: int = 6, blocks: int = 40, rows: int = 4
    ) -> Layer:
        """Normal weights, ratio tokens per entry of c channels, an empty state of `blocks` blocks of `rows` rows."""
        g = torch.Generator().manual_seed(7)
        w = 2 * c if overlap else c
        wkv, wgate = torch.randn(w, hidden, generator=g), torch.randn(w, hidden, generator=g)
        state = torch.zeros(blocks, rows, 2 * w)
        state[0] = float("nan")
        return cls(ratio, c, wkv, wgate, torch.randn(ratio, w, generator=g), 1 + 0.3 * torch.randn(c, generator=g), state)

    def table(self, sequences: int, tokens: int) -> Tensor:
        """Non-contiguous blocks for every row of every sequence."""
        width = tokens // self.state.shape[1] + 1
        order = torch.arange(1, self.state.shape[0]).flip(0)[: sequences * width]
        return order.view(width, sequences).T.contiguous().int()

    def args(self, x: Tensor, table: Tensor, lengths: list[int], starts: list[int], surplus: int = 0) -> tuple[Any, ...]:
        """Arguments of a call; rotary rows are those of position i*m."""
        made = [range(s // self.ratio, (s + n) // self.ratio) for s, n in zip(starts, lengths, strict=True)]
        position = torch.tensor([i * self.ratio for r in made for i in r] + [3] * surplus, dtype=torch.float32)
        angle = position[:, None] * 0.3 ** torch.arange(1, self.rotary // 2 + 1)
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        weights = (self.wkv, self.wgate, self.ape, self.norm)
        return (x, *weights, angle.cos(), angle.sin(), self.state, table, cu, torch.tensor(starts, dtype=torch.int32))

    def run(self, x: Tensor, table: Tensor, lengths: list[int], starts: list[int], surplus: int = 0) -> Tensor:
        return CPU(*self.args(x, table, lengths, starts, surplus), ratio=self.ratio, eps=EPS)


def _direct(layer: Layer, x: Tensor) -> Tensor:
    """Entries of one whole sequence from the formula: the previous block of entry 0 has s = -inf; rotation as complex numbers."""
    m, c, n = layer.ratio, layer.c, len(x) // layer.ratio
    x, wkv, wgate, ape, norm = (t.double() for t in (x[: n * m], layer.wkv, layer.wgate, layer.ape, layer.norm))
    k = torch.einsum("td,wd->tw", x, wkv).reshape(n, m, -1)
    s = torch.einsum("td,wd->tw", x, wgate).reshape(n, m, -1) + ape
    if wkv.shape[0] == 2 * c:
        before_k = torch.cat([torch.zeros(1, m, c, dtype=torch.float64), k[:-1, :, :c]])
        before_s = torch.cat([torch.full((1, m, c), -torch.inf, dtype=torch.float64), s[:-1, :, :c]])
        k, s = torch.cat([before_k, k[:, :, c:]], 1), torch.cat([before_s, s[:, :, c:]], 1)
    e = torch.exp(s - s.amax(1, keepdim=True))
    v = (e * k).sum(1) / e.sum(1)
    y = v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    z = torch.complex(y[:, c - layer.rotary :: 2].contiguous(), y[:, c - layer.rotary + 1 :: 2].contiguous())
    angle = (torch.arange(n)[:, None] * m).float() * 0.3 ** torch.arange(1, layer.rotary // 2 + 1)
    turned = torch.view_as_real(z * torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())).flatten(1)
    return torch.cat([y[:, : c - layer.rotary], turned], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_bound_on_every_sample(dtype: torch.dtype) -> None:
    verdicts = [judge(compress, CPU, sample) for sample in compress.samples(dtype, 11)]
    assert len(verdicts) > 30
    wrong = [str(v) for v in verdicts if not v.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_inputs_are_named(dtype: torch.dtype) -> None:
    for wrong in compress.errors(dtype):
        with pytest.raises(ValueError, match=wrong.match):
            compress.meta(*wrong.args, **wrong.kwargs)


def test_cost_counts_products_state_and_results() -> None:
    layer = Layer.random()
    cost = compress.cost(*layer.args(torch.zeros(3, 6), layer.table(1, 9), [3], [6]), ratio=4, eps=EPS)
    row = 2 * 16 * 4
    weights = (3 * 6 + 2 * 16 * 6 + 4 * 16 + 8 + 2 * 2) * 4
    assert cost.matmul_flops == 2 * 3 * 6 * 32
    assert cost.bytes_read == weights + (layer.table(1, 9).numel() + 3) * 4 + 6 * row  # tokens 0..5 come from the state
    assert cost.bytes_written == 8 * 4 + 3 * row


def _mutate(position: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        changed = list(args)
        changed[position] = change(args[position])
        return CPU(*changed, **kwargs)

    return broken


def _chunk_relative_ape(*args: Any, **kwargs: Any) -> Tensor:
    changed = list(args)
    changed[3] = args[3].roll(int(args[10][0]) % kwargs["ratio"], 0)
    return CPU(*changed, **kwargs)


def _no_state_write(*args: Any, **kwargs: Any) -> Tensor:
    changed = list(args)
    changed[7] = args[7].clone()
    return CPU(*changed, **kwargs)


MUTANTS: dict[str, Callable[..., Tensor]] = {
    "halves-swapped": _mutate(1, lambda wkv: wkv.roll(len(wkv) // 2, 0)),
    "value-scaled": _mutate(1, lambda wkv: wkv * 1.02),
    "chunk-relative-ape": _chunk_relative_ape,
    "inverse-rotation": _mutate(6, lambda sin: -sin),
    "no-state-write": _no_state_write,
    "gate-scaled": _mutate(2, lambda wgate: wgate * 1.01),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_rejects_broken_variants(name: str, dtype: torch.dtype) -> None:
    sample = next(s for s in compress.samples(dtype, 3) if s.name == "six-at-129")
    assert judge(compress, CPU, sample).ok
    assert not judge(compress, MUTANTS[name], sample).ok


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (16, False)])
def test_equals_independent_formula(ratio: int, overlap: bool) -> None:
    layer = Layer.random(ratio=ratio, overlap=overlap)
    x = torch.randn(39, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer.run(x, layer.table(1, 39), [39], [0]).double(), _direct(layer, x), rtol=2e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([(4, True), (2, True), (4, False), (8, False), (1, True)]),
    rows=st.sampled_from([1, 3, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    chunks=st.lists(st.integers(0, 11), min_size=1, max_size=8),
)
def test_any_chunking_equals_one_shot(kind: tuple[int, bool], rows: int, dtype: torch.dtype, chunks: list[int]) -> None:
    total = sum(chunks)
    layer = Layer.random(ratio=kind[0], overlap=kind[1], rows=rows, blocks=total // rows + 3)
    layer.wkv, layer.wgate = layer.wkv.to(dtype), layer.wgate.to(dtype)
    x = torch.randn(total, 6, generator=torch.Generator().manual_seed(total)).to(dtype)
    table = layer.table(1, total)
    args = layer.args(x, table, [total], [0])
    golden_state = layer.state.clone()
    golden = compress.reference(*args[:7], golden_state, *args[8:], ratio=layer.ratio, eps=EPS, compute=torch.float64)
    allowed, _ = compress.bound(*args, ratio=layer.ratio, eps=EPS, golden=(golden, golden_state), found=())
    got, start = [], 0
    for n in chunks:
        got.append(layer.run(x[start : start + n], table, [n], [start]))
        start += n
    found = torch.cat(got)
    assert found.shape == golden.shape and found.dtype == dtype
    assert bool(((found.double() - golden).abs() <= roundoff(dtype) * golden.abs() + allowed).all())
    torch.testing.assert_close(layer.state[1:], golden_state[1:], rtol=1e-5, atol=1e-5)


def _probe_layer(first: tuple[float, float], second: tuple[float, float]) -> Layer:
    """Two channels over x = [value, 1]: channel 0 is `first` (previous block) or `second` (own block), channel 1 is always 1."""
    layer = Layer.random(c=2, hidden=2)
    layer.wkv = torch.tensor([first, (0.0, 1.0), second, (0.0, 1.0)])
    layer.wgate, layer.ape, layer.norm, layer.rotary = torch.zeros(4, 2), torch.zeros(4, 4), torch.ones(2), 0
    return layer


def _pooled_values(layer: Layer, values: Tensor, start: int = 0) -> Tensor:
    """Channel 0 before the norm, which keeps the ratio of the two channels."""
    x = torch.stack((values, torch.ones_like(values)), 1)
    table = layer.table(1, len(values))
    if start:
        layer.run(x[:start], table, [start], [0])
    y = layer.run(x[start:], table, [len(values) - start], [start])
    return y[:, 0] / y[:, 1]


def test_first_half_serves_the_next_entry() -> None:
    values = torch.arange(1.0, 13.0)
    before = _pooled_values(_probe_layer((1.0, 0.0), (0.0, 0.0)), values)
    torch.testing.assert_close(before, torch.tensor([0.0, (1 + 2 + 3 + 4) / 8, (5 + 6 + 7 + 8) / 8]))
    own = _pooled_values(_probe_layer((0.0, 0.0), (1.0, 0.0)), values)
    torch.testing.assert_close(own[1:], torch.tensor([(5 + 6 + 7 + 8) / 8, (9 + 10 + 11 + 12) / 8]))


def test_entry_zero_has_no_previous_block() -> None:
    own = _pooled_values(_probe_layer((9.0, 0.0), (1.0, 0.0)), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(own, torch.tensor([10 / 4]))  # four slots share the softmax, not eight


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 7])
def test_ape_is_indexed_by_absolute_position(start: int) -> None:
    layer = _probe_layer((0.0, 0.0), (1.0, 0.0))
    layer.ape[:, :2] = -200.0
    layer.ape[2, 2:] = 200.0
    picked = _pooled_values(layer, torch.arange(12.0), start)
    torch.testing.assert_close(picked, torch.tensor([2.0, 6.0, 10.0])[start // 4 :])


def test_entry_is_rotated_at_its_first_position() -> None:
    layer = Layer.random()
    x = torch.randn(9 + 8, 6, generator=torch.Generator().manual_seed(2))
    table, lengths, starts = layer.table(2, 20), [9, 8], [0, 0]
    rotated = layer.run(x, table, lengths, starts)
    args = list(layer.args(x, table, lengths, starts))
    args[5], args[6] = torch.ones_like(args[5]), torch.zeros_like(args[6])
    plain = CPU(*args, ratio=4, eps=EPS)
    for row, entry in enumerate([0, 1, 0, 1]):
        for pair in range(2):
            angle, at = torch.tensor(entry * 4 * 0.3 ** (pair + 1)), 4 + 2 * pair
            a, b = plain[row, at], plain[row, at + 1]
            expected = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))
            torch.testing.assert_close(rotated[row, at : at + 2], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated[:, :4], plain[:, :4])


@pytest.mark.parametrize("kept", range(4, 13))
@pytest.mark.parametrize("overlap", [True, False])
def test_rejected_tokens_leave_no_trace(kept: int, overlap: bool) -> None:
    g = torch.Generator().manual_seed(kept)
    x, rejected = torch.randn(24, 6, generator=g), torch.randn(3, 6, generator=g)
    clean, dirty = Layer.random(overlap=overlap), Layer.random(overlap=overlap)
    table = clean.table(1, 24)
    for layer in (clean, dirty):
        layer.run(x[:kept], table, [kept], [0])
    dirty.run(rejected, table, [3], [kept])
    # truncating is only to continue at `kept` again
    expected = clean.run(x[kept:], table, [24 - kept], [kept])
    assert torch.equal(dirty.run(x[kept:], table, [24 - kept], [kept]), expected)
    assert torch.equal(dirty.state[1:], clean.state[1:])


def test_empty_sequences_padding_and_surplus_rows_do_nothing() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(13, 6, generator=g)
    alone, crowd = Layer.random(), Layer.random()
    alone.run(x[:6], alone.table(1, 20), [6], [0])
    table = crowd.table(4, 20)
    crowd.run(x[:6], table, [0, 6, 0, 0], [3, 0, 0, 8])
    untouched = crowd.state.clone()
    expected = alone.run(x[6:], alone.table(1, 20), [7], [6])
    padded = torch.cat((x[6:], torch.full((5, 6), float("nan"))))
    found = crowd.run(padded, table, [0, 7, 0, 0], [3, 6, 0, 8], surplus=4)
    torch.testing.assert_close(found[:2], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2:], torch.zeros(4, 8))
    others = table[[0, 2, 3]].flatten().long()
    assert torch.equal(crowd.state[others], untouched[others])
    assert crowd.run(x[:0], table, [0, 0, 0, 0], [3, 13, 0, 8], surplus=2).count_nonzero() == 0


def test_tokens_without_a_block_are_not_written() -> None:
    layer = Layer.random()
    x = torch.randn(23, 6, generator=torch.Generator().manual_seed(6))
    full = layer.table(1, 23)
    expected = layer.run(x, full, [23], [0])
    written = layer.state.clone()
    layer.state.fill_(3.0)
    holes = full.clone()
    holes[0, :4] = 0
    assert torch.equal(layer.run(x, holes, [23], [0]), expected)
    kept = holes[0, 4:].long()
    assert torch.equal(layer.state[kept[0]], written[kept[0]])
    rest = [b for b in range(layer.state.shape[0]) if b not in kept.tolist()]
    assert torch.equal(layer.state[rest], torch.full_like(layer.state[rest], 3.0))


def test_rows_it_does_not_need_are_not_read() -> None:
    layer = Layer.random()
    x = torch.randn(13, 6, generator=torch.Generator().manual_seed(8))
    table = layer.table(1, 13)
    layer.run(x[:11], table, [11], [0])
    layer.state[table[0, 0].long()] = float("nan")  # tokens 0..3; entry 2 pools 4..11
    assert bool(layer.run(x[11:], table, [2], [11]).isfinite().all())


def test_batch_equals_single_sequences() -> None:
    lengths, starts = [7, 1, 4, 2], [0, 3, 6, 130]
    g = torch.Generator().manual_seed(9)
    layer = Layer.random(blocks=200)
    layer.state[1:] = torch.randn(layer.state[1:].shape, generator=g)
    single = Layer.random(blocks=200)
    single.state.copy_(layer.state)
    x, table = torch.randn(14, 6, generator=g), layer.table(4, 140)
    together = layer.run(x, table, lengths, starts)
    parts, done = [], 0
    for b, (n, s) in enumerate(zip(lengths, starts, strict=True)):
        parts.append(single.run(x[done : done + n], table[b : b + 1], [n], [s]))
        done += n
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state[1:], single.state[1:], rtol=1e-5, atol=1e-5)


def test_reference_agrees_with_itself_in_float64() -> None:
    samples: list[Sample] = [s for s in compress.samples(torch.float32, 0) if s.name in ("ragged", "long-ragged")]
    assert len(samples) == 2
    for sample in samples:
        assert judge(compress, lambda *a, **k: compress.reference(*a, **k, compute=torch.float64).float(), sample).ok
