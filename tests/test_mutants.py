"""The judge itself: every mutant of every op is rejected, for every type it declares; every legal variant is accepted."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch

from ops import CONTRACTS
from ops.judge import golden_of, judge
from ops.mutants import LEGAL, MUTANTS, Plant, rounded_reference, samples_by_size

DTYPES = (torch.float32, torch.bfloat16)
HARD = {"sparse_attention", "compress", "index_topk", "gate_topk", "gate_hash"}
WITHOUT = dict.fromkeys(
    ("all_gather", "all_reduce", "all_to_all"),
    "samples have one rank, for which the op is a copy; tests/test_moe.py runs them on several ranks",
)
"""Contracts without mutants, and why."""


def survivors(op: str, dtype: torch.dtype, seed: int) -> list[str]:
    """Mutants that no sample of this seed catches."""
    contract = CONTRACTS[op]
    correct, left = rounded_reference(contract), [m for m in MUTANTS[op].values() if dtype in m.dtypes]
    for sample in samples_by_size(contract, dtype, seed):
        if not left:
            break
        golden = golden_of(contract, sample)
        left = [m for m in left if judge(contract, m.make(correct), sample, golden=golden).ok]
    return [str(m) for m in left]


def false_alarms(op: str, dtype: torch.dtype, seed: int) -> list[str]:
    """Verdicts against legal variants."""
    contract = CONTRACTS[op]
    correct, variants = rounded_reference(contract), [v for v in LEGAL[op].values() if dtype in v.dtypes]
    wrong = []
    for sample in contract.samples(dtype, seed):
        golden = golden_of(contract, sample)
        verdicts = {v: judge(contract, v.make(correct), sample, golden=golden) for v in variants}
        wrong += [f"{v}: {verdict}" for v, verdict in verdicts.items() if not verdict.ok]
    return wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(MUTANTS))
def test_mutants_are_rejected(op: str, dtype: torch.dtype, seed: int) -> None:
    for s in (seed, zlib.crc32(f"{op}-{dtype}-{seed}".encode())):
        assert survivors(op, dtype, s) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted(LEGAL))
def test_legal_variants_are_accepted(op: str, dtype: torch.dtype, seed: int) -> None:
    assert false_alarms(op, dtype, seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(MUTANTS))
def test_mutants_are_rejected_on_twenty_seeds(op: str) -> None:
    for seed in range(20):
        for dtype in DTYPES:
            assert survivors(op, dtype, seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(LEGAL))
def test_legal_variants_are_accepted_on_fifty_seeds(op: str) -> None:
    for dtype in DTYPES:
        assert [alarm for seed in range(50) for alarm in false_alarms(op, dtype, seed)] == []


@pytest.mark.parametrize("op", sorted(set(CONTRACTS) - set(WITHOUT)))
def test_enough_mutants(op: str) -> None:
    for dtype in DTYPES:
        own = [m for m in MUTANTS[op].values() if dtype in m.dtypes and not m.body.__module__.endswith(".generic")]
        assert len(own) >= (12 if op in HARD else 8), f"{op}, {dtype}: faults any kernel can have do not count"
    assert all(set(m.dtypes) <= set(DTYPES) and m.dtypes and m.what for m in (*MUTANTS[op].values(), *LEGAL[op].values()))


def test_every_contract_has_mutants_or_a_reason() -> None:
    assert set(MUTANTS) == set(CONTRACTS) - set(WITHOUT) == set(LEGAL)
    assert all(WITHOUT.values())
    assert all(Plant.parse(str(m)).variant is m for mutants in MUTANTS.values() for m in mutants.values())


def test_a_plant_sits_in_its_place_and_at_its_step() -> None:
    plant = Plant.parse("unit_rms_norm:scaled@layers.3#1")
    assert str(plant) == "unit_rms_norm:scaled@layers.3#1"
    ops = SimpleNamespace(unit_rms_norm=lambda x, *, eps: x + 1, rope=None)
    assert plant.scope("layers.2", ops) is ops
    planted, x = plant.scope("layers.3", ops), torch.ones(2, 8)
    assert [float(planted.unit_rms_norm(x, eps=0.0)[0, 0]) for _ in range(3)] == [2.0, pytest.approx(2.01), 2.0]
    everywhere = Plant.parse("unit_rms_norm:scaled")
    assert float(everywhere.scope("head", ops).unit_rms_norm(x, eps=0.0)[0, 0]) == pytest.approx(2.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms_norm", "expected OP:MUTANT"),
        ("rms_nrom:nan", "did you mean 'rms_norm'"),
        ("rms_norm:nam", "did you mean 'nan'"),
        ("rms_norm:nan@layers.2#x", "expected OP:MUTANT"),
    ],
)
def test_a_wrong_plant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plant.parse(text)
