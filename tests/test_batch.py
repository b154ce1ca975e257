"""The layout of a call: a single token is laid out without arrays, and must be laid out alike."""

from __future__ import annotations

import torch

from tests.checkpoints import CONFIG
from v4 import batch, rope
from v4.cache import Cache


def test_one_token_is_laid_out_as_any_call_is() -> None:
    ratios = (0, 4, 128)
    cache = Cache(CONFIG, ratios, dtype=torch.float32, device=torch.device("cpu"), max_tokens=600, max_sequences=3, max_chunk=8)
    tables = batch.RopeTables(rope.frequencies(CONFIG, compressed=False), rope.frequencies(CONFIG, compressed=True))
    cache.new_sequence()
    sequence = cache.new_sequence()
    made = 0
    for position in range(520):
        assert sequence.length == position
        single = batch.build(cache, tables, [sequence], [[position % 7]], torch.device("cpu"))
        several = batch._several(cache, tables, [sequence], [[position % 7]], torch.device("cpu"))
        assert single.entries.keys() == several.entries.keys() == {4, 128}
        for name, value in vars(several).items():
            pairs = [(getattr(single, name), value)]
            if isinstance(value, dict):
                assert value.keys() == getattr(single, name).keys()
                pairs = [(getattr(single, name)[key], value[key]) for key in value]
            for found, wanted in pairs:
                parts = ((found,), (wanted,)) if isinstance(wanted, torch.Tensor) else (found, wanted)
                for a, b in zip(*(p if isinstance(p, tuple) else tuple(vars(p).values()) for p in parts), strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b), (position, name)
        made += len(single.entries[4].slots)
        sequence.advance(1)
    assert made == 130
    sequence.rollback(3)
    again = batch.build(cache, tables, [sequence], [torch.tensor([3])], torch.device("cpu"))
    assert again.start_pos.tolist() == [517] and again.ids.tolist() == [3] and again.tokens == 1
