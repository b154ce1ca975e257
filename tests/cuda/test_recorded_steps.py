"""Recorded steps without a GPU: nothing in a step needs the host, and a replay, which runs no Python, gives what eager steps give.

The first is shown on meta tensors at V4-Flash's widths, the second with a tape of ops and launches on a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import v4
from backends.cuda.graphs import Capture, Function, Replayed
from backends.cuda_triton import attention
from ops.contract import CONTRACTS
from ops.host_reads import HostReads, NotRecordable
from ops.probe import Probe
from ops.registry import bind, chain_of
from tests import tiny
from tests.cuda.recording import Tape, launches
from tools.runconfig import named_config
from v4 import batch as batches
from v4.cache import Cache, Format
from v4.config import Config
from v4.make import make
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_graphs.py records on the device")

BF16 = torch.bfloat16
PROBES = {"cuda_triton": Probe(device="cuda", soc="sm90", have=frozenset({"triton"})), "cuda": Probe(), "cpu": Probe()}


def hopper_ops() -> SimpleNamespace:
    return bind(chain_of("cuda"), dtype=BF16, probes=PROBES).ops


class MetaCapture:
    """Runs the work on tensors without data, where every read of a value fails; counts what HostReads sees."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.launched: list[str] = []

    def __call__(self, function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        with launches(lambda *call: None, run=False):
            function(buffers)  # tables that are made once come from the host
        with launches(lambda kernel, args, kwargs: self.launched.append(kernel.fn.__name__), run=False), HostReads() as reads:
            result = function(buffers)
        self.places += reads.places
        return lambda: result


def runner_with(model: Model, capture: Capture) -> tuple[Runner, list[Replayed]]:
    """A runner whose single steps go through this capture, and what holds the recordings of each cache."""
    made: list[Replayed] = []

    def replayed(function: Function, device: torch.device) -> Function:
        made.append(Replayed(function, device, capture))
        return made[-1]

    return Runner(model, replayed), made


def meta_steps(batch: int, before: int, steps: int, **settings: Any) -> tuple[MetaCapture, int]:
    config = named_config("flash")
    if settings:
        config = replace(config, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)
    model = Model(Settings(config, hopper_ops(), BF16, **settings), mtp=False)
    where = torch.device("meta")
    cache = Cache(config, model.ratios, dtype=BF16, device=where, max_tokens=1024, max_sequences=batch, max_chunk=16, fmt=model.settings.format)
    sequences = [cache.new_sequence() for _ in range(batch)]
    for b, sequence in enumerate(sequences):
        cache.assume(sequence, before - b)
    capture = MetaCapture()
    runner, made = runner_with(model, capture)
    for _ in range(steps):
        streams = runner.forward(cache, sequences, [[7]] * batch)
        assert streams.shape == (batch, config.hc_mult, config.hidden_size)
    assert [s.length for s in sequences] == [before - b + steps for b in range(batch)]
    return capture, made[0].held


@pytest.mark.parametrize(("batch", "before", "shapes"), [(1, 126, 2), (1, 127, 2), (3, 126, 2), (4, 160, 1)])
def test_a_step_of_flash_needs_nothing_from_the_host(batch: int, before: int, shapes: int) -> None:
    found, count = meta_steps(batch, before, 4)
    assert found.places == []
    assert count == shapes
    # attention of every layer, two products of every layer's experts, two compressors in CSA layers and one in HCA layers
    layers = named_config("flash").num_hidden_layers
    assert found.launched.count("attend") == found.launched.count("gate_up") == shapes * layers
    assert found.launched.count("store") == shapes * (2 * 21 + 20)


PACKED: list[dict[str, Any]] = [
    {"experts": "fp4"},
    {"experts": "fp4", "linears": "fp8", "simulate": True},
    {"experts": "fp4", "format": Format(kv="fp8", index="fp8")},
]


@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_steps_of_packed_weights_and_rows_need_nothing_from_the_host(settings: dict[str, Any]) -> None:
    assert meta_steps(1, 126, 2, **settings)[0].places == []


@pytest.mark.parametrize(
    ("settings", "place"),
    [({"experts": "fp8"}, "no data|meta"), ({"format": Format(index="fp4")}, "no data|meta")],
    ids=str,
)
def test_what_has_no_kernel_yet_is_not_recordable(settings: dict[str, Any], place: str) -> None:
    """Kept so that this list shrinks in sight: each of these reads values in plain torch."""
    with pytest.raises((NotImplementedError, RuntimeError), match=place):
        meta_steps(1, 126, 1, **settings)


SIZES = {
    "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 2, "head_dim": 32, "index_n_heads": 16, "index_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hc_sinkhorn_iters": 3, "q_lora_rank": 16, "o_lora_rank": 16,
}  # fmt: skip
"""As small as the interpreter is slow."""


class Model3:
    """A small model of all three kinds of layers over the kernels, with a cache that holds a synthetic context."""

    def __init__(self, folder: Path) -> None:
        ops = hopper_ops()
        make(Config.from_dict(tiny.config([0, 4, 128], **SIZES)), folder, 0, storage="bf16")
        self.model = v4.load(folder, ops=dict.fromkeys(CONTRACTS, "cpu"), scope=lambda place, _: ops, mtp=False)
        self.runner = self.model.runner

    def cache(self, *lengths: int) -> tuple[Cache, list[Any]]:
        cache = self.runner.session(max_tokens=384, max_sequences=len(lengths), max_chunk=8).cache
        sequences = [cache.new_sequence() for _ in lengths]
        for seed, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            cache.fill_synthetic(sequence, length, seed)
        return cache, sequences


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model3:
    return Model3(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def three_steps(small: Model3) -> list[Tensor]:
    """Streams of three eager steps after 127 tokens."""
    cache, sequences = small.cache(127)
    return [eager(small, cache, sequences, [token]) for token in (5, 6, 7)]


def eager(small: Model3, cache: Cache, sequences: list[Any], tokens: list[int]) -> Tensor:
    return small.runner.forward(cache, sequences, [[t] for t in tokens])


@pytest.mark.parametrize(("lengths", "steps", "shapes"), [((253,), 5, 2), ((254, 127), 4, 2)])
def test_replays_give_what_eager_steps_give(small: Model3, lengths: tuple[int, ...], steps: int, shapes: int) -> None:
    """Over the completion of CSA and HCA entries, bitwise: streams of every step, and all that is stored at the end."""
    cache, sequences = small.cache(*lengths)
    other, others = small.cache(*lengths)
    tape = Tape(watch=len(lengths) == 1)
    runner, made = runner_with(small.runner.model, tape)
    tokens = [5 + i for i in range(len(lengths))]
    for _ in range(steps):
        expected, found = eager(small, cache, sequences, tokens), runner.forward(other, others, [[t] for t in tokens])
        assert torch.equal(expected, found)
        tokens = small.runner.logits(expected).argmax(-1).tolist()
    assert made[0].held == shapes < steps
    assert tape.launched > 20
    for mine, theirs in zip(cache.pools(), other.pools(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_value_read_while_recording_is_refused_with_its_place(small: Model3, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.plan
    cache, sequences = small.cache(40)

    def reading(*sizes: Any) -> attention.Plan:
        int(cache.layers[0].window[0, 0, 0])
        return plain(*sizes)

    monkeypatch.setattr(attention, "plan", reading)
    with pytest.raises(NotRecordable, match=r"backends/cuda_triton/attention.py:\d+ _sparse_attention: (item|_local_scalar_dense)"):
        runner_with(small.runner.model, Tape())[0].forward(cache, sequences, [[3]])


@pytest.mark.parametrize("lost", [None, "ids", "start_pos", "window_slots", "cos 1", "table window"])
def test_a_field_that_is_not_renewed_shows(
    small: Model3, three_steps: list[Tensor], monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    """The comparison with eager steps sees a buffer that is not written anew for a step that is replayed."""
    plain, replaying = batches.tensors, []

    def forgetful(batch: batches.Batch) -> dict[str, Tensor]:
        return {n: torch.zeros_like(v) if n == lost and replaying else v for n, v in plain(batch).items()}

    monkeypatch.setattr(batches, "tensors", forgetful)
    cache, sequences = small.cache(127)
    runner, made = runner_with(small.runner.model, Tape(watch=False))
    # the first step completes entries, the other two do not
    assert torch.equal(runner.forward(cache, sequences, [[5]]), three_steps[0])
    assert torch.equal(runner.forward(cache, sequences, [[6]]), three_steps[1])
    replaying.append(True)
    assert torch.equal(runner.forward(cache, sequences, [[7]]), three_steps[2]) == (lost is None)
    assert made[0].held == 2
