"""Prompts of 3, 4, 5, 127, 128 and 129 tokens through a whole layer of Flash's widths by the vendor's ops, then single steps, beside the CPU's.

Source: Ascend operator notes, section 10, lessons; the compressor alone is in test_pitfalls_prompts.py, for both widths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends.ascend.prepare import prepare
from ops.registry import bind
from tests.ascend.bound import binding_of
from tests.ascend.conftest import HARDWARE, LEVEL
from tests.ascend.layer import KINDS, config_of, fill
from tests.ascend.wide import PROMPTS
from v4.cache import Cache
from v4.model import Model
from v4.runner import Runner
from v4.settings import Settings

BF16, STEPS = torch.bfloat16, 4
ALLOWED = 0.02
"""Of the norm: two evaluations in bf16, a few roundings of 2^-8 apart."""


@pytest.fixture(autouse=True)
def one_chip(soc: str) -> None:
    if LEVEL == "l2" and not HARDWARE and soc != "910_93":
        pytest.skip("takes seconds: one chip here, every chip at l3")


@functools.cache
def runner(kind: str, soc: str | None, device: torch.device) -> Runner:
    """One layer with random weights, bound for a chip, or for the CPU where `soc` is None."""
    binding = bind(("cpu",), dtype=BF16) if soc is None else binding_of(soc, BF16)
    model = Model(Settings(config_of("flash", KINDS[kind], experts=6, inner=64), binding.ops, BF16), mtp=False)
    fill(model, device)
    if soc is not None:
        prepare(model)
    return Runner(model)


Result = tuple[Tensor, Tensor]


def result(kind: str, soc: str | None, device: torch.device, prompt: int, after: Callable[[Cache], None] | None = None) -> Result:
    """What attention gives for the prompt and each step [T, D], and the entries in the cache [E, 512], fp32; `after` is done behind the prompt."""
    run = runner(kind, soc, device)
    seen: list[Tensor] = []
    handle = run.model.layers[0].attn.register_forward_hook(lambda _, args, y: seen.append(y.float().cpu()))  # type: ignore[union-attr]
    cache = run.session(max_tokens=256, max_chunk=256).cache
    sequence = cache.new_sequence()
    ids = [(37 * i + 11) % 256 for i in range(prompt + STEPS)]
    run.forward(cache, [sequence], [ids[:prompt]])
    if after:
        after(cache)
    for i in range(prompt, prompt + STEPS):
        run.forward(cache, [sequence], [ids[i : i + 1]])
    handle.remove()
    stored, table = cache.layers[0].entries, cache.groups[f"entries{KINDS[kind]}"].table[sequence.slot].long()
    assert stored is not None
    return torch.cat(seen), stored.float().cpu()[table].flatten(0, 1)[: (prompt + STEPS) // KINDS[kind]]


@functools.cache
def golden(kind: str, prompt: int) -> Result:
    return result(kind, None, torch.device("cpu"), prompt)


def worst(found: Result, kind: str, prompt: int) -> float:
    """Largest distance of a token or an entry from the CPU's, in units of its norm."""
    return max(float(((f - g).norm(dim=1) / g.norm(dim=1)).amax()) for f, g in zip(found, golden(kind, prompt), strict=True) if len(g))


def state_cleared(cache: Cache) -> None:
    for state in (cache.layers[0].state, cache.layers[0].index_state):
        if state is not None:
            state.zero_()


@pytest.mark.parametrize("kind", ["CSA", "HCA"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_and_single_steps(prompt: int, kind: str, soc: str, device: torch.device) -> None:
    assert worst(result(kind, soc, device, prompt), kind, prompt) < ALLOWED


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_state_that_the_prompt_did_not_leave_is_seen(prompt: int, soc: str, device: torch.device) -> None:
    kinds = ["CSA"] + ["HCA"] * (prompt < 128 <= prompt + STEPS)
    assert all(worst(result(kind, soc, device, prompt, state_cleared), kind, prompt) > 10 * ALLOWED for kind in kinds)
