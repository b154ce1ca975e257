"""A decode step of the whole model on tensors without data: it reads no value on the host, which a graph of it could not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind, chain_of
from tools.cuda_aot import compiling
from tools.runconfig import named_config
from v4.batch import Batch, Entries
from v4.cache import Cache
from v4.model import Model
from v4.settings import Settings

tokens, without = int(sys.argv[1]), sys.argv[2:]
probes = {"cuda_triton": Probe(device="cuda", soc="sm90", have=frozenset({"triton"})), "cuda": Probe(device="cuda"), "cpu": Probe()}
bound = bind(chain_of("cuda"), dtype=torch.bfloat16, probes=probes, overrides={op: "cuda" for op in without})
reading, used = set(), set()


def watched(op, fn):
    def call(*args, **kwargs):
        used.add(op)
        try:
            return fn(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            reading.add(op)
            return CONTRACTS[op].meta(*args, **kwargs)

    return call


def t(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


ops = SimpleNamespace(**{op: watched(op, fn) for op, fn in vars(bound.ops).items()})
config = replace(
    named_config("flash"), num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, num_nextn_predict_layers=0
)
model = Model(Settings(config, ops, torch.bfloat16, experts="fp4", linears="fp8"), mtp=False).to("meta")
cache = Cache(config, model.ratios, dtype=torch.bfloat16, device=torch.device("meta"), max_tokens=8192, max_sequences=tokens)
for made in (0, 1):
    entries = {m: Entries(t(made, dtype=torch.int64), t(made, 32), t(made, 32)) for m in (4, 128)}
    batch = Batch(
        ids=t(tokens, dtype=torch.int64), cu_seqlens=t(tokens + 1, dtype=torch.int32), start_pos=t(tokens, dtype=torch.int32),
        positions=t(tokens, dtype=torch.int64), window_slots=t(tokens, dtype=torch.int64), entries=entries,
        tables={name: t(tokens, group.width, dtype=torch.int32) for name, group in cache.groups.items()},
        rope={kind: (t(tokens, 32), t(tokens, 32)) for kind in (False, True)},
    )
    with compiling([]), torch.inference_mode():
        ops.argmax(model.logits(model(batch, cache)))
print("ops", len(used), "reading", *sorted(reading))
"""


def step(tokens: int, *without: str) -> list[str]:
    """Ops that read a value in a step of `tokens` sequences; those of `without` are left to torch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", STEP, str(tokens), *without]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, count, _, *reading = done.stdout.split()
    assert int(count) >= 20
    return reading


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_decode_step_reads_no_value(tokens: int) -> None:
    assert step(tokens) == []


def test_reading_is_seen() -> None:
    assert step(1, "moe_dispatch") == ["moe_dispatch"]
