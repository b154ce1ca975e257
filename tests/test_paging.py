"""Block allocation: unique blocks, recycling behind the live range, rollback, clear refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from v4.cache import SLACK, Cache, CacheFull, Format, Group, GroupSpec, group_specs, row_bytes
from v4.config import Config


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.from_file("configs/tiny.json")


def make(config: Config, **changes: object) -> Cache:
    sizes: dict[str, object] = {"max_tokens": 3000, "max_sequences": 3, "max_chunk": 700, **changes}
    return Cache(config, (0, 4, 128), dtype=torch.float32, device=torch.device("cpu"), **sizes)  # type: ignore[arg-type]


def live_rows(group: Group, length: int) -> range:
    # SLACK of the kept rows are for rollbacks that have already happened
    first = 0 if group.spec.keep is None else max(length - (group.spec.keep - SLACK), 0)
    return range(first // group.spec.tokens_per_row, length // group.spec.tokens_per_row)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["add", "back", "free"]), st.integers(1, 700)), max_size=40))
def test_live_rows_stay_unique_through_any_history(moves: list[tuple[int, str, int]]) -> None:
    cache = make(Config.from_file("configs/tiny.json"))
    sequences = [cache.new_sequence() for _ in range(3)]
    for who, move, amount in moves:
        sequence = sequences[who]
        if move == "add" and sequence.length + amount <= cache.max_tokens:
            cache.reserve(sequence, amount)
            sequence.advance(amount)
        elif move == "back":
            back = min(amount % SLACK, sequence.length, SLACK - (sequence._furthest - sequence.length))
            sequence.rollback(max(back, 0))
        elif move == "free":
            cache.free(sequence)
            sequences[who] = cache.new_sequence()
        for group in cache.groups.values():
            taken = [
                (int(group.table[s.slot, row // group.spec.block_rows]), row % group.spec.block_rows)
                for s in sequences
                for row in live_rows(group, s.length)
            ]
            assert len(set(taken)) == len(taken)
            assert all(0 < block < group.blocks for block, _ in taken), "a live row lies in the null block"


def test_every_block_returns_after_free(config: Config) -> None:
    cache = make(config)
    before = {name: g.free_blocks for name, g in cache.groups.items()}
    sequence = cache.new_sequence()
    for n in (1, 3, 128, 700, 5):
        cache.reserve(sequence, n)
        sequence.advance(n)
    cache.free(sequence)
    assert {name: g.free_blocks for name, g in cache.groups.items()} == before


def test_state_of_a_long_chunk_is_stored_for_its_tail_only(config: Config) -> None:
    cache = make(config)
    sequence = cache.new_sequence()
    cache.reserve(sequence, 700)
    state = cache.groups["state4"]
    held = int((state.table[sequence.slot] != 0).sum())
    assert held <= -(-(8 + SLACK) // state.spec.block_rows) + 1


def test_too_long_contexts_and_chunks_are_refused_before_any_work(config: Config) -> None:
    cache = make(config)
    sequence = cache.new_sequence()
    with pytest.raises(ValueError, match="chunk of 701 tokens: the cache was built for chunks of at most 700"):
        cache.reserve(sequence, 701)
    sequence.advance(2990)
    with pytest.raises(CacheFull, match="sequence of 3001 tokens: the cache was built for 3000"):
        cache.reserve(sequence, 11)
    for _ in range(2):
        cache.new_sequence()
    with pytest.raises(CacheFull, match="every sequence slot"):
        cache.new_sequence()
    with pytest.raises(ValueError, match="must be positive"):
        make(config, max_tokens=0)


def test_rollback_is_limited_to_what_the_cache_still_holds(config: Config) -> None:
    sequence = make(config).new_sequence()
    sequence.advance(SLACK + 10)
    sequence.rollback(SLACK)
    with pytest.raises(ValueError, match="at most"):
        sequence.rollback(1)
    with pytest.raises(ValueError, match="the sequence holds"):
        sequence.rollback(11)


def test_packed_rows_have_the_published_sizes() -> None:
    flash = Config.from_file("configs/flash.json")
    assert row_bytes(flash, Format("fp8", "fp4"), torch.bfloat16) == (584, 68)
    assert row_bytes(flash, Format("fp8", "fp8"), torch.bfloat16) == (584, 132)
    assert row_bytes(flash, Format(), torch.bfloat16) == (1024, 256)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'plain' or 'fp8'"):
        Format(kv="int8")
    with pytest.raises(ValueError, match="'fp4'"):
        Format(index="int8")


def test_group_specs_follow_the_ratios(config: Config) -> None:
    assert set(group_specs(config, (0, 0))) == {"window"}
    assert set(group_specs(config, (4, 128))) == {"window", "entries4", "state4", "entries128", "state128"}


def test_live_blocks_bound_what_a_group_can_hold() -> None:
    spec = GroupSpec("window", 1, 16, 40)
    group = Group(spec, max_tokens=2000, max_sequences=1, max_chunk=100)
    for start in range(0, 1900, 100):
        group.reserve(0, start, start + 100)
    assert group.free_blocks >= 0
