"""Cache writes and their decoders: contracts, byte layout by hand, skipped slots, offsets beyond 31 bits.

Layouts of specification 10.4; codes are checked against plain Python, not against the quantisers.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import backends.cpu.cache  # noqa: F401  (registers the implementations)
from ops import cache as ops_cache
from ops.cache import cache_insert, cache_insert_fp8, index_insert_fp4, index_insert_fp8, unpack_fp8_rows, unpack_index_rows
from ops.contract import Contract
from ops.judge import judge

INSERTS = (cache_insert, cache_insert_fp8, index_insert_fp8, index_insert_fp4)
DTYPES = (torch.float32, torch.bfloat16)


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
    return -value if sign else value


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = tuple(_e4m3(code) for code in range(0x7F))


def _nearest(value: float, grid: tuple[float, ...]) -> int:
    """Code of the nearest magnitude, ties to the even code, saturating; sign bit on top."""
    magnitude = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda i: (abs(grid[i] - magnitude), i % 2))
    top = 0x80 if len(grid) > 8 else 8
    return code | (top if math.copysign(1.0, value) < 0 else 0)


def _exponent(amax: float, floor: float, largest: float) -> int:
    mantissa, exponent = math.frexp(max(amax, floor) / largest)
    return exponent - 1 if mantissa == 0.5 else exponent


def _fp8_by_hand(values: list[float], group: int) -> tuple[list[int], list[int]]:
    codes, exponents = [], []
    for at in range(0, len(values), group):
        part = values[at : at + group]
        e = _exponent(max(map(abs, part)), 1e-4, 448.0)
        exponents.append(e)
        codes += [_nearest(v / 2.0**e, E4M3) for v in part]
    return codes, exponents


def _rows(count: int, channels: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, channels, generator=g) * torch.logspace(-6, 4, count)[:, None]).to(torch.bfloat16)


@pytest.mark.parametrize("contract", INSERTS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_on_every_sample(contract: Contract, dtype: torch.dtype) -> None:
    verdicts = [judge(contract, contract.impls["cpu"].fn, sample) for sample in contract.samples(dtype, 4)]
    assert len(verdicts) >= 10
    wrong = [str(v) for v in verdicts if not v.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("contract", INSERTS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_inputs_are_named(contract: Contract, dtype: torch.dtype) -> None:
    for wrong in contract.errors(dtype):
        with pytest.raises(ValueError, match=wrong.match):
            contract.meta(*wrong.args, **wrong.kwargs)


@pytest.mark.parametrize("contract", INSERTS, ids=lambda c: c.name)
def test_judge_rejects_a_skipped_write_and_a_written_skip(contract: Contract) -> None:
    fn = contract.impls["cpu"].fn
    sample = next(s for s in contract.samples(torch.float32, 4) if s.name.startswith("odd"))
    null = 1 if contract.name == "cache_insert" else 0  # plain rows may land in slot 0

    def forgets(cache: Tensor, rows: Tensor, slots: Tensor, **kwargs: int) -> None:
        fn(cache, rows[1:], slots[1:], **kwargs)

    def wraps(cache: Tensor, rows: Tensor, slots: Tensor, **kwargs: int) -> None:
        fn(cache, rows, torch.where(slots < 0, null, slots), **kwargs)

    assert judge(contract, fn, sample).ok
    assert not judge(contract, forgets, sample).ok
    assert not judge(contract, wraps, sample).ok


def test_plain_insert_copies_rows_and_skips_minus_one() -> None:
    cache = torch.zeros(3, 2, 4)
    rows = torch.arange(12.0).view(3, 4)
    cache_insert.impls["cpu"].fn(cache, rows, torch.tensor([5, -1, 2]))
    expected = torch.zeros(6, 4)
    expected[5], expected[2] = rows[0], rows[2]
    assert torch.equal(cache.view(6, 4), expected)


def test_fp8_block_layout_by_hand() -> None:
    per_block, rows, slots = 6, _rows(5, 512, 1), [6, 11, 17, 9, 12]
    cache = torch.full((3, per_block, 584), 0xAB, dtype=torch.uint8)
    cache_insert_fp8.impls["cpu"].fn(cache, rows, torch.tensor(slots))
    flat = cache.view(3, per_block * 584)
    for row, slot in zip(rows, slots, strict=True):
        block, at = divmod(slot, per_block)
        codes, exponents = _fp8_by_hand(row[:448].tolist(), 64)
        rope = b"".join(struct.pack("<H", v & 0xFFFF) for v in row[448:].view(torch.int16).tolist())
        assert bytes(flat[block, at * 576 : at * 576 + 576].tolist()) == bytes(codes) + rope
        scales = flat[block, per_block * 576 + at * 8 :][:8].tolist()
        assert scales == [e + 127 for e in exponents] + [0]
    written = {divmod(s, per_block) for s in slots}
    for block in range(3):
        for at in (a for a in range(per_block) if (block, a) not in written):
            assert set(flat[block, at * 576 : at * 576 + 576].tolist()) == {0xAB}
            assert set(flat[block, per_block * 576 + at * 8 :][:8].tolist()) == {0xAB}


@pytest.mark.parametrize(
    ("amax", "exponent"), [(0.0, -22), (0.7, -9), (1.0, -8), (448.0, 0), (449.0, 1), (1e-4, -22), (4.48e8, 20)]
)
def test_scale_rule(amax: float, exponent: int) -> None:
    row = torch.zeros(1, 512)
    row[0, 5] = -amax
    cache = torch.zeros(2, 1, 584, dtype=torch.uint8)
    cache_insert_fp8.impls["cpu"].fn(cache, row, torch.tensor([1]))
    assert cache[1, 0, 576].item() == exponent + 127
    keys = torch.zeros(2, 1, 132, dtype=torch.uint8)
    index_insert_fp8.impls["cpu"].fn(keys, row[:, :128], torch.tensor([1]))
    assert struct.unpack("<f", bytes(keys[1, 0, 128:].tolist()))[0] == 2.0**exponent


def test_index_fp8_layout_by_hand() -> None:
    per_block, rows, slots = 4, _rows(4, 128, 2), [4, 7, 10, 5]
    cache = torch.zeros(3, per_block, 132, dtype=torch.uint8)
    index_insert_fp8.impls["cpu"].fn(cache, rows, torch.tensor(slots))
    flat = cache.view(3, per_block * 132)
    for row, slot in zip(rows, slots, strict=True):
        block, at = divmod(slot, per_block)
        codes, exponents = _fp8_by_hand(row.tolist(), 128)
        assert flat[block, at * 128 : at * 128 + 128].tolist() == codes
        assert bytes(flat[block, per_block * 128 + at * 4 :][:4].tolist()) == struct.pack("<f", 2.0 ** exponents[0])


def test_index_fp4_layout_by_hand() -> None:
    per_block, rows, slots = 4, _rows(4, 128, 3), [4, 7, 10, 5]
    rows[1, :8] = torch.tensor([6.0, 5.0, -2.5, 0.25, 0.75, -0.0, 3.5, -6.0], dtype=torch.bfloat16)  # ties under scale 1
    rows[1, 8:] = 0
    cache = torch.zeros(3, per_block, 68, dtype=torch.uint8)
    index_insert_fp4.impls["cpu"].fn(cache, rows, torch.tensor(slots))
    flat = cache.view(3, per_block * 68)
    for row, slot in zip(rows, slots, strict=True):
        block, at = divmod(slot, per_block)
        found = flat[block, at * 64 : at * 64 + 64].tolist()
        scales = flat[block, per_block * 64 + at * 4 :][:4].tolist()
        for group in range(4):
            values = row[32 * group : 32 * group + 32].tolist()
            e = _exponent(max(map(abs, values)), 6 * 2.0**-126, 6.0)
            assert scales[group] == e + 127
            for j, value in enumerate(values):
                nibble = found[16 * group + j // 2] >> (4 * (j % 2)) & 15
                code = _nearest(value / 2.0**e, E2M1)
                assert nibble & 7 == code & 7
                assert nibble & 7 == 0 or nibble == code  # the sign of zero carries no value


@pytest.mark.parametrize("rope_dim", [16, 64])
def test_fp8_rows_decode_to_the_rounded_values(rope_dim: int) -> None:
    channels = 80 if rope_dim == 16 else 512
    nope, rows = channels - rope_dim, _rows(6, channels, 4)
    cache = torch.zeros(4, 3, sum(ops_cache.fp8_row_parts(channels, rope_dim)), dtype=torch.uint8)
    slots = torch.tensor([3, 11, 7, 4, 9, 8])
    cache_insert_fp8.impls["cpu"].fn(cache, rows, slots, rope_dim=rope_dim)
    found = unpack_fp8_rows(cache, slots.view(2, 3), nope=nope, rope_dim=rope_dim, dtype=torch.float64).view(6, channels)
    for row, decoded in zip(rows, found.tolist(), strict=True):
        codes, exponents = _fp8_by_hand(row[:nope].tolist(), 64)
        assert decoded[:nope] == [_e4m3(code) * 2.0 ** exponents[j // 64] for j, code in enumerate(codes)]
        assert decoded[nope:] == row[nope:].tolist()
    half = unpack_fp8_rows(cache, slots, nope=nope, rope_dim=rope_dim, dtype=torch.bfloat16)
    assert torch.equal(half.double(), found)


@pytest.mark.parametrize("width", [132, 68])
def test_index_rows_decode_to_the_rounded_values(width: int) -> None:
    rows, slots = _rows(6, 128, 5), torch.tensor([3, 11, 7, 4, 9, 8])
    cache = torch.zeros(4, 3, width, dtype=torch.uint8)
    (index_insert_fp8 if width == 132 else index_insert_fp4).impls["cpu"].fn(cache, rows, slots)
    found = unpack_index_rows(cache, slots.view(3, 2), dtype=torch.bfloat16, compute=torch.float64).view(6, 128)
    group, grid, floor = (128, E4M3, 1e-4) if width == 132 else (32, E2M1, 6 * 2.0**-126)
    for row, decoded in zip(rows.tolist(), found.tolist(), strict=True):
        for at in range(0, 128, group):
            part = row[at : at + group]
            scale = 2.0 ** _exponent(max(map(abs, part)), floor, grid[-1])
            expected = [math.copysign(grid[_nearest(abs(v) / scale, grid)], v) * scale for v in part]
            assert decoded[at : at + group] == expected


def test_float_index_cache_is_gathered() -> None:
    cache = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    found = unpack_index_rows(cache, torch.tensor([[5, 2]]), dtype=torch.float32, channels=16)
    assert torch.equal(found, cache.view(6, 16)[[5, 2]][None])


def test_index_width_is_checked() -> None:
    slots = torch.tensor([1])
    with pytest.raises(ValueError, match=r"is 100 wide, expected 132 \(FP8\) or 68 \(FP4\) for 128 channels"):
        unpack_index_rows(torch.zeros(2, 2, 100, dtype=torch.uint8), slots, dtype=torch.float32)
    with pytest.raises(ValueError, match="is 100 wide, expected 128 channels"):
        unpack_index_rows(torch.zeros(2, 2, 100), slots, dtype=torch.float32)


def test_negative_slots_decode_to_finite_rows() -> None:
    slots, cache = torch.tensor([-1, -1]), torch.zeros(2, 2, 584, dtype=torch.uint8)
    assert unpack_fp8_rows(cache, slots, nope=448, rope_dim=64, dtype=torch.float32).isfinite().all()
    for width in (132, 68):
        assert unpack_index_rows(torch.zeros(2, 2, width, dtype=torch.uint8), slots, dtype=torch.float32).isfinite().all()


def test_offsets_beyond_31_bits() -> None:
    blocks = 2**31 // (128 * 584) + 2  # only the pages written below become resident
    cache = torch.empty(blocks, 128, 584, dtype=torch.uint8)
    row = _rows(2, 512, 6)
    slots = torch.tensor([blocks * 128 - 1, blocks * 128 - 128])
    cache_insert_fp8.impls["cpu"].fn(cache, row, slots)
    last = torch.zeros(1, 128, 584, dtype=torch.uint8)
    cache_insert_fp8.impls["cpu"].fn(last, row, torch.tensor([127, 0]))
    found = unpack_fp8_rows(cache, slots, nope=448, rope_dim=64, dtype=torch.float32)
    assert torch.equal(found, unpack_fp8_rows(last, torch.tensor([127, 0]), nope=448, rope_dim=64, dtype=torch.float32))
    assert torch.equal(cache[-1, :, -8:].flatten()[-8:], last[0].flatten()[-8:])


def test_blocks_may_lie_apart() -> None:
    pool = torch.zeros(3, 4 * 584 + 240, dtype=torch.uint8)
    cache = pool[:, : 4 * 584].unflatten(1, (4, 584))
    rows, slots = _rows(3, 512, 7), torch.tensor([4, 11, 6])
    cache_insert_fp8.impls["cpu"].fn(cache, rows, slots)
    dense = torch.zeros(3, 4, 584, dtype=torch.uint8)
    cache_insert_fp8.impls["cpu"].fn(dense, rows, slots)
    assert torch.equal(cache, dense) and not pool[:, 4 * 584 :].any()


@settings(max_examples=30, deadline=None)
@given(
    per_block=st.sampled_from([1, 3, 16]),
    picks=st.lists(st.integers(0, 47), unique=True, max_size=12),
    skipped=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_inserted_rows_are_read_back(per_block: int, picks: list[int], skipped: int, seed: int) -> None:
    cache = torch.zeros(1 + 48 // per_block, per_block, 16, dtype=torch.bfloat16)
    slots = torch.tensor([per_block + p for p in picks] + [-1] * skipped, dtype=torch.int64)
    rows = torch.randn(len(slots), 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    cache_insert.impls["cpu"].fn(cache, rows, slots)
    flat = cache.view(-1, 16)
    assert torch.equal(flat[slots[: len(picks)]], rows[: len(picks)])
    assert int(flat.any(1).sum()) == len(picks)
