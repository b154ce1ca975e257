"""Plain torch runs on any device: nothing is made without saying where.

With another default device, a tensor made without a device lies there and not beside the arguments, so that mixing the two fails:
what this finds on a CPU is what would fail, or be copied back and forth, on an accelerator.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import v4
from ops.contract import CONTRACTS
from ops.judge import golden_of, judge
from ops.registry import bind, unavailable
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.parametrize("op", sorted(CONTRACTS))
def test_costs_stay_where_their_arguments_are(op: str) -> None:
    for sample in CONTRACTS[op].samples(torch.bfloat16, 0):
        expected = CONTRACTS[op].cost(*sample.args, **sample.kwargs)
        with torch.device("meta"):
            assert CONTRACTS[op].cost(*sample.args, **sample.kwargs) == expected


def test_asking_for_a_backend_that_can_not_run_changes_no_setting() -> None:
    if unavailable("cuda") is None:
        pytest.skip("there is a CUDA device here")
    setting = "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction"
    code = f"import torch\nbefore = {setting}\nimport backends.cuda\nbackends.cuda.probe()\nassert {setting} == before"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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
