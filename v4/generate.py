"""Generation loops: chunked prefill, one token at a time, or speculative with the MTP block's drafts verified by the model.

Shapes: n streams, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4.cache import SLACK, Cache, Sequence
from v4.runner import Runner
from v4.sampling import Sampler


@dataclass
class GenerateResult:
    """Generated token ids and how they came about; times in seconds, rates in tokens per second of decoding.

    accepted_runs: of each speculative step, how many of its drafts were accepted.
    """

    tokens: list[int]
    stopped: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    steps: int
    drafted: int = 0
    accepted: int = 0
    accepted_runs: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second; the first token comes out of the prefill and is not counted."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 and len(self.tokens) > 1 else 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that the model confirmed."""
        return self.accepted / self.drafted if self.drafted else 0.0


def prefill(
    runner: Runner,
    cache: Cache,
    sequence: Sequence,
    ids: Seq[int],
    chunk: int,
    each: Callable[[Tensor, int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Store the prompt in chunks; streams [1, n, D] of its last token. `each(streams, start)` sees every chunk's streams."""
    last = torch.empty(0, device=runner.device)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        streams = runner.forward(cache, [sequence], [part])
        last = streams[-1:]
        if each:
            each(streams, start)
        if progress:
            progress(len(part))
    return last


class Drafter:
    """Keeps the MTP block's cache in step with the model's and proposes the next tokens greedily."""

    def __init__(self, runner: Runner, cache: Cache, count: int) -> None:
        if not 1 <= count <= SLACK - 1:
            raise ValueError(f"draft tokens: found {count}, expected 1 to {SLACK - 1}")
        self.runner, self.cache, self.count = runner, cache, count
        self.sequence = cache.new_sequence()

    def follow(self, streams_TnD: Tensor, next_ids: Seq[int]) -> Tensor:
        """Store confirmed positions: their streams and the tokens after them. MTP streams [1, n, D] of the last one."""
        return self.runner.draft(self.cache, self.sequence, next_ids, streams_TnD)[-1:]

    def propose(self, streams_1nD: Tensor) -> list[int]:
        """`count` greedy drafts after the last confirmed token; the drafter's cache is left as it was."""
        drafts: list[int] = []
        for i in range(self.count):
            drafts.append(int(self.runner.model.end_ops.argmax(self.runner.draft_logits(streams_1nD))))
            if i + 1 < self.count:
                streams_1nD = self.runner.draft(self.cache, self.sequence, drafts[-1:], streams_1nD)
        self.sequence.rollback(self.count - 1)
        return drafts


def _check(ids: Seq[int], max_new_tokens: int, vocabulary: int) -> None:
    if not len(ids):
        raise ValueError("the prompt has no tokens; give at least one (the begin-of-sentence token starts every prompt)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    if (low := min(ids)) < 0 or (high := max(ids)) >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary of {vocabulary}; was the prompt made with another tokenizer?")


def generate(
    runner: Runner,
    ids: Seq[int],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    speculative: int = 0,
    chunk: int = 2048,
    on_token: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> GenerateResult:
    """Continue one prompt.

    stop: token ids that end the text (kept as the last token). speculative: draft tokens per step, 0 for none; needs greedy
    sampling and yields exactly the greedy tokens. Raises ValueError for an empty prompt, ids outside the vocabulary, a context
    beyond the model's range, or speculation with a sampling temperature.
    """
    ids = list(ids)
    _check(ids, max_new_tokens, runner.model.config.vocab_size)
    if speculative and not sampler.greedy:
        raise ValueError("speculative decoding verifies greedy drafts: set temperature to 0 or turn speculation off")
    session = runner.session(
        max_tokens=len(ids) + max_new_tokens + speculative,
        max_chunk=max(min(chunk, len(ids)), speculative + 1),
        drafts=speculative > 0,
    )
    sequence = session.cache.new_sequence()
    drafter = Drafter(runner, session.draft_cache, speculative) if session.draft_cache else None
    began = time.perf_counter()
    held: list[Tensor] = []

    def follow_prompt(streams: Tensor, start: int) -> None:
        # the MTP block needs each position's next token: the last position of a chunk waits for the chunk after it
        known = torch.cat([*held, streams]) if held else streams
        first = start - (1 if held else 0)
        held[:] = [known[-1:]]
        if len(known) > 1 and drafter:
            drafter.follow(known[:-1], ids[first + 1 : first + len(known)])

    last = prefill(runner, session.cache, sequence, ids, chunk, follow_prompt if drafter else None, progress)
    result = GenerateResult([], "length", len(ids), 0.0, 0.0, 0)

    def emit(token: int) -> bool:
        result.tokens.append(token)
        if on_token:
            on_token(token)
        if token in stop:
            result.stopped = "stop"
        return token in stop or len(result.tokens) >= max_new_tokens

    done = emit(sampler(runner.logits(last))[0])
    decoding = time.perf_counter()
    result.prefill_seconds = decoding - began
    confirmed = last
    while not done:
        newest = result.tokens[-1]
        result.steps += 1
        if drafter is None:
            streams = runner.forward(session.cache, [sequence], [[newest]])
            done = emit(sampler(runner.logits(streams))[0])
            continue
        drafts = drafter.propose(drafter.follow(confirmed, result.tokens[-len(confirmed) :]))
        streams = runner.forward(session.cache, [sequence], [[newest, *drafts]])
        best = sampler(runner.logits(streams))
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == best[accepted]:
            accepted += 1
        result.drafted += len(drafts)
        result.accepted += accepted
        result.accepted_runs.append(accepted)
        sequence.rollback(len(drafts) - accepted)
        confirmed = streams[: accepted + 1]
        for token in best[: accepted + 1]:
            if done := emit(token):
                break
    result.decode_seconds = time.perf_counter() - decoding
    return result
