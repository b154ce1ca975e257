"""Reported mistakes around experts' clamps and MTP drafts: each is planted, and the check that is right without it must turn.

Source: specification section 13; tests/pitfalls.yaml says which test stands for which report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import v4
from tests import clear, tiny
from tests.tolerance import replaced
from v4.generate import Drafter
from v4.runner import Runner
from v4.sampling import Sampler

EXPERTS = {"exact": ("moe_mlp", "clamped_swiglu"), "reference": ("grouped_experts_fp4", "clamped_swiglu")}
"""Ops that compute experts, routed and shared, by the way of computing."""


@functools.cache
def model(numerics: str) -> v4.LoadedModel:
    return v4.load(tiny.checkpoint("flash"), backend="cpu", dtype=torch.float32, numerics=numerics)


@functools.cache
def ids() -> list[int]:
    return list(clear.prompts("flash", 1, 150)[0])


# ---- the clamp at every expert call ------------------------------------------------------------------------------------------


def limits_seen(numerics: str) -> list[tuple[str, float]]:
    """Every op that was called with a limit while the model computed a prompt and a draft, and the limit."""
    found: list[tuple[str, float]] = []

    def wrap(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "limit" in kwargs:
                found.append((name, kwargs["limit"]))
            return fn(*args, **kwargs)

        return call

    m = model(numerics)
    with replaced(m.binding.ops, wrap):
        m.generate(ids()[:9], 3, speculative=1, stop=())
    return found


def every_call_is_clamped(numerics: str) -> bool:
    """Routed and shared experts of all layers and of the MTP block, each call with the configuration's limit."""
    found, m = limits_seen(numerics), model(numerics)
    blocks = len(m.runner.model.layers)
    counts = [sum(name == op for name, _ in found) for op in EXPERTS[numerics]]
    return min(counts) > blocks and counts[0] == counts[1] and {limit for _, limit in found} == {m.config.swiglu_limit}


@pytest.mark.parametrize("numerics", EXPERTS)
def test_every_expert_call_has_the_clamp(numerics: str) -> None:
    assert every_call_is_clamped(numerics)


@pytest.mark.parametrize("block", ["layers.0", "layers.4", "mtp.0"])
@pytest.mark.parametrize("part", ["experts", "shared_experts"])
@pytest.mark.parametrize("numerics", EXPERTS)
def test_a_clamp_lost_in_one_place_is_seen(numerics: str, part: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model(numerics).runner.model.get_submodule(f"{block}.ffn.{part}"), "limit", 1e30)
    assert not every_call_is_clamped(numerics)


# ---- drafts ------------------------------------------------------------------------------------------------------------------


def first_draft_error(chunk: int) -> float:
    """Logits of the first draft behind a prompt, against the MTP block over the whole prompt at once."""
    m, seen = model("exact"), []
    draft_logits = Runner.draft_logits

    def watched(self: Runner, streams: Tensor) -> Tensor:
        seen.append(draft_logits(self, streams))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "draft_logits", watched)
        first = m.generate(ids(), 2, speculative=1, stop=(), chunk=chunk).tokens[0]
    session = m.runner.session(max_tokens=len(ids()) + 1, max_chunk=len(ids()), drafts=True)
    assert session.draft_cache is not None
    streams = m.runner.forward(session.cache, [session.cache.new_sequence()], [ids()])
    whole = m.runner.draft(session.draft_cache, session.draft_cache.new_sequence(), [*ids()[1:], first], streams)
    golden = m.runner.draft_logits(whole[-1:])
    return float((seen[0] - golden).abs().max() / golden.abs().max())


@pytest.mark.parametrize("chunk", [2048, 64, 1])
def test_the_first_draft_knows_the_prompt(chunk: int) -> None:
    assert first_draft_error(chunk) <= 2e-5


def test_a_draft_cache_that_is_not_filled_over_the_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Drafter.follow

    def newest_only(self: Drafter, streams: Tensor, next_ids: Any) -> Tensor:
        return follow(self, streams[-1:], next_ids[-1:])

    monkeypatch.setattr(Drafter, "follow", newest_only)
    assert first_draft_error(2048) > 1e-3


def test_greedy_drafts_at_a_temperature_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy proposals are hardly accepted where the model draws its tokens, and taking them would change the distribution."""
    with pytest.raises(ValueError, match="speculative decoding verifies greedy drafts"):
        model("exact").generate(ids()[:9], 3, temperature=1.0, speculative=1, stop=())
    monkeypatch.setattr(Sampler, "greedy", property(lambda self: True))
    assert model("exact").generate(ids()[:9], 3, temperature=1.0, speculative=1, stop=()).tokens, "the guard is what refused"
