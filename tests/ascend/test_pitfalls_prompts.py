"""Prompts of 3, 4, 5, 127, 128 and 129 tokens through the vendor's compressor, then single steps: entries and state are those of one call.

These are the lengths around the end of an entry of CSA (4 tokens) and of HCA (128), where kernels were reported to be wrong (GDzhu01 76: from
the fourth token on). Widths of Flash and Pro. Each fault is planted at the first step behind the prompt, for every length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.contract import CONTRACTS
from ops.registry import on_device
from tests.ascend.bound import binding_of
from tests.ascend.conftest import HARDWARE, LEVEL
from tests.ascend.test_adapters_chunks import KINDS, TOKENS, Sequence
from tests.ascend.test_adapters_pitfalls import COMPRESSOR, _Altered
from tests.ascend.wide import PROMPTS

STEPS = 6
Result = tuple[Tensor, Tensor]


def calls(prompt: int) -> list[tuple[int, int]]:
    """The prompt, STEPS single tokens, the rest up to the last six in one call, which are single tokens again."""
    edges = sorted({0, *range(prompt, min(prompt + STEPS, TOKENS) + 1), *range(TOKENS - 6, TOKENS + 1)})
    edges = [e for e in edges if e == 0 or e >= prompt]
    return list(zip(edges, edges[1:], strict=False))


def run(compress: Callable[..., Tensor], kind: str, hidden: int, parts: list[tuple[int, int]], after: Callable[[Sequence], None] | None = None) -> Result:
    """Entries and kept state of the sequence; `after` is done to it behind the first call."""
    sequence, entries = Sequence(kind, hidden), {}
    for i, (first, end) in enumerate(parts):
        entries.update(sequence.call(compress, first, end))
        if after and i == 0:
            after(sequence)
    state = sequence.state[sequence.table[0].long()].flatten(0, 1)[:TOKENS]
    return torch.stack([entries[i].float() for i in sorted(entries)]), state


@functools.cache
def at_once(kind: str, hidden: int) -> Result:
    """By the contract's reference, which no fault is planted in."""
    return run(CONTRACTS["compress"].reference, kind, hidden, [(0, TOKENS)])


def same(found: Result, kind: str, hidden: int) -> bool:
    entries, state = at_once(kind, hidden)
    # bf16 entries once rounded; fp32 state of products that sum in another order
    return torch.allclose(found[0], entries, rtol=2**-7, atol=2**-7) and torch.allclose(found[1], state, rtol=1e-4, atol=1e-4)


@pytest.fixture
def compress(soc: str, device: torch.device) -> Callable[..., Tensor]:
    if LEVEL == "l2" and not HARDWARE and soc != "910_93":
        pytest.skip("the adapter is the same on every chip: one chip here, every chip at l3")
    fn: Callable[..., Any] = binding_of(soc, torch.bfloat16, "compress").ops.compress
    return fn if device.type == "cpu" else on_device(fn, CONTRACTS["compress"], device)


@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_and_single_steps_are_one_call(prompt: int, hidden: int, compress: Callable[..., Tensor]) -> None:
    wrong = [kind for kind in KINDS if not same(run(compress, kind, hidden, calls(prompt)), kind, hidden)]
    assert not wrong


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_state_that_the_prompt_did_not_leave_is_seen(prompt: int, compress: Callable[..., Tensor]) -> None:
    unseen = [kind for kind in KINDS if same(run(compress, kind, 4096, calls(prompt), lambda s: s.state.zero_()), kind, 4096)]
    assert not unseen


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_first_step_at_the_prompts_start_is_seen(prompt: int, compress: Callable[..., Tensor]) -> None:
    def at_0(kwargs: dict[str, Any]) -> dict[str, Any]:
        start = kwargs["start_pos"]
        return {**kwargs, "start_pos": torch.zeros_like(start) if int(start) == prompt else start}

    with _Altered(COMPRESSOR, at_0) as mode:
        unseen = [kind for kind in KINDS if same(run(compress, kind, 4096, calls(prompt)), kind, 4096)]
    assert mode.reached
    assert not unseen
