"""Speculative decoding with the vendor's ops: drafts that are taken back leave nothing behind, so the tokens are those of greedy decoding.

In fp32: in bf16 a verified step of several rows rounds otherwise than steps of one, and random weights have near ties (an expert or a token
turns on any backend, cpu included).
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import v4
from tests.ascend.conftest import HARDWARE
from tools.npu_standin.calls import recording
from tools.runconfig import named_config
from v4.cache import Sequence
from v4.generate import Drafter
from v4.make import make

PROMPT, NEW, DRAFTS = 126, 12, 3
"""The prompt ends before the end of an entry of HCA and inside one of CSA: drafts cross both and come back."""
IDS = [0, *torch.randint(5, 500, (PROMPT - 1,), generator=torch.Generator().manual_seed(3)).tolist()]


@functools.cache
def nano() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="v4-nano-"))
    make(named_config("nano"), folder, 0)
    return folder


@pytest.fixture
def model(soc: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> v4.LoadedModel:
    monkeypatch.setenv("V4_ASCEND_SOC", soc)
    monkeypatch.setenv("V4_ASCEND_DEVICE", device.type)
    return v4.load(nano(), backend="ascend", max_context=256, dtype=torch.float32)


def some_are_right(greedy: list[int]) -> Callable[[Drafter, torch.Tensor], list[int]]:
    """Random weights hardly ever confirm a draft: these are right two times of three."""
    text, draw = [*IDS, *greedy], random.Random(5)

    def propose(self: Drafter, streams_1nD: torch.Tensor) -> list[int]:
        known = self.sequence.length + 1
        truth = [text[i] if i < len(text) else 7 for i in range(known, known + self.count)]
        return [t if draw.random() < 0.67 else (t + 1) % 500 for t in truth]

    return propose


def test_the_tokens_are_the_greedy_ones(model: v4.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = model.generate(IDS, NEW, stop=()).tokens
    with recording() as record:
        own = model.generate(IDS, NEW, stop=(), speculative=DRAFTS)
        monkeypatch.setattr(Drafter, "propose", some_are_right(greedy))
        mixed = model.generate(IDS, NEW, stop=(), speculative=DRAFTS)
    assert own.tokens == mixed.tokens == greedy
    assert len(set(greedy)) > 3  # not one token again and again
    assert 0 < mixed.accepted < mixed.drafted and own.accepted < own.drafted
    assert HARDWARE or record.launches("vendor").total() > 100

    rollback, left = Sequence.rollback, [1]

    def leaves_one_draft_once(self: Sequence, tokens: int) -> None:
        rollback(self, tokens - left.pop() if tokens and left else tokens)

    # the drafter takes its own drafts back as well: only the model's caches shall keep one
    monkeypatch.setattr(Drafter, "propose", lambda self, streams_1nD: [7] * DRAFTS)
    monkeypatch.setattr(Sequence, "rollback", leaves_one_draft_once)
    assert model.generate(IDS, NEW, stop=(), speculative=DRAFTS).tokens != greedy, "a draft left in the caches is not seen"
    assert not left
