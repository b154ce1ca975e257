"""Plain torch runs on any device: nothing is made without saying where.

With another default device, a tensor made without a device lies there and not beside the arguments, so that mixing the two fails:
what this finds on a CPU is what would fail, or be copied back and forth, on an accelerator.
"""

from __future__ import annotations

import pytest
import torch

import v4
from ops.contract import CONTRACTS
from ops.judge import golden_of, judge
from ops.registry import bind
from tests import tiny

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(CONTRACTS))
def test_ops_stay_where_their_arguments_are(op: str, dtype: torch.dtype) -> None:
    contract, fn = CONTRACTS[op], getattr(bind(("cpu",), dtype=dtype, only=[op]).ops, op)

    def elsewhere(*args: object, **kwargs: object) -> object:
        with torch.device("meta"):
            return fn(*args, **kwargs)

    for sample in contract.samples(dtype, 0):
        verdict = judge(contract, elsewhere, sample, golden=golden_of(contract, sample))
        assert verdict.ok, verdict


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_the_graph_stays_where_its_parameters_are(name: str, numerics: str) -> None:
    model = v4.load(tiny.checkpoint(name), ops=dict.fromkeys(CONTRACTS, "cpu"), numerics=numerics)
    ids = tiny.tokens(150)
    right = model.generate(ids, 5, stop=[], speculative=True).tokens, model.logits_batch([ids[:9], ids[:1], ids])
    drawn = model.generate(ids, 4, stop=[], temperature=0.8, top_k=20, top_p=0.9, seed=3).tokens
    with torch.device("meta"):
        assert model.generate(ids, 5, stop=[], speculative=True).tokens == right[0]
        assert all(torch.equal(a, b) for a, b in zip(model.logits_batch([ids[:9], ids[:1], ids]), right[1], strict=True))
        assert model.generate(ids, 4, stop=[], temperature=0.8, top_k=20, top_p=0.9, seed=3).tokens == drawn
