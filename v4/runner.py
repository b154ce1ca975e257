"""Running the graph over sequences: chunked prefill, single steps, drafts and rollback.

Shapes: T tokens, n streams, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from v4 import batch as batches
from v4 import rope
from v4.cache import HOST, Cache, Sequence
from v4.model import Model


@dataclass
class Session:
    """A set of sequences in one cache, with the MTP block's own window cache when drafts are wanted."""

    cache: Cache
    draft_cache: Cache | None


Function: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
Replayed: TypeAlias = Callable[[Function, torch.device], Function]
"""A backend's way to run a function of tensors again and again, always with the same launches for the same shapes."""


class Runner:
    """Feeds token ids through a materialised model. `replayed`: how steps of one token a sequence are run, None for call by call."""

    def __init__(self, model: Model, replayed: Replayed | None = None) -> None:
        self.model, self.replayed = model, replayed
        self._steps: weakref.WeakKeyDictionary[Cache, Function] = weakref.WeakKeyDictionary()
        self.device = model.embed.weight.device
        self.tables = batches.RopeTables(
            rope.frequencies(model.config, compressed=False), rope.frequencies(model.config, compressed=True)
        )

    def session(self, *, max_tokens: int, max_sequences: int = 1, max_chunk: int = 4096, drafts: bool = False) -> Session:
        """Caches for `max_sequences` sequences of `max_tokens` tokens. ValueError beyond the model's position range."""
        limit = self.model.config.max_position_embeddings
        if max_tokens > limit:
            raise ValueError(
                f"context of {max_tokens} tokens: the model's max_position_embeddings is {limit}; shorten the prompt"
            )
        if drafts and not self.model.mtp:
            raise ValueError(
                "drafts need the MTP block: this checkpoint has none, or it was loaded without; turn speculation off"
            )

        def cache(ratios: Seq[int]) -> Cache:
            s = self.model.settings
            return Cache(
                s.config, ratios, dtype=s.dtype, device=self.device, max_tokens=max_tokens, max_sequences=max_sequences,
                max_chunk=min(max_chunk, max_tokens), fmt=s.format,
            )  # fmt: skip

        return Session(cache(self.model.ratios), cache(self.model.mtp_ratios) if drafts else None)

    @torch.inference_mode()
    def forward(self, cache: Cache, sequences: Seq[Sequence], ids: Seq[Seq[int] | Tensor]) -> Tensor:
        """Store `ids[b]` as the next tokens of `sequences[b]`; streams [T, n, D] of all new tokens, sequence after sequence."""
        if self.replayed is not None and all(len(new) == 1 for new in ids):
            # made on the host, so that all of it goes to the device in one copy
            layout = batches.padded(batches.build(cache, self.tables, sequences, ids, HOST))
            streams_TnD = self._step(cache, self.replayed)(batches.tensors(layout))
        else:
            streams_TnD = self.model(batches.build(cache, self.tables, sequences, ids, self.device), cache)
        for sequence, new in zip(sequences, ids, strict=True):
            sequence.advance(len(new))
        return streams_TnD

    def _step(self, cache: Cache, replayed: Replayed) -> Function:
        if cache not in self._steps:
            # what is kept for a cache must not keep the cache
            layers, model = cache.layers, self.model

            def function(named: Mapping[str, Tensor]) -> Tensor:
                return model.run(batches.of_tensors(named), layers)

            self._steps[cache] = replayed(function, self.device)
        return self._steps[cache]

    @torch.inference_mode()
    def draft(self, cache: Cache, sequence: Sequence, next_ids: Seq[int] | Tensor, streams_TnD: Tensor) -> Tensor:
        """MTP step over the next positions of `sequence`: streams there and the tokens after them -> streams [T, n, D]."""
        layout = batches.build(cache, self.tables, [sequence], [next_ids], self.device)
        out = self.model.draft(streams_TnD, layout.ids, layout, cache)
        sequence.advance(len(next_ids))
        return out

    @torch.inference_mode()
    def logits(self, streams_RnD: Tensor) -> Tensor:
        """Logits fp32 [R, V] of main-model streams."""
        return self.model.logits(streams_RnD)

    @torch.inference_mode()
    def draft_logits(self, streams_RnD: Tensor) -> Tensor:
        """Logits fp32 [R, V] of MTP streams."""
        return self.model.draft_logits(streams_RnD)
