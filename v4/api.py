"""The Python entry point: load a checkpoint, compute logits, generate, and see which implementations run.

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ops.registry import Binding, bind, chain_of, load_backend
from v4.cache import HOST, Format
from v4.checkpoint import Checkpoint
from v4.config import Config
from v4.generate import GenerateResult, generate
from v4.load import LoadReport, load_parameters
from v4.model import Model
from v4.prompt_texts import PromptTexts
from v4.runner import Replayed, Runner
from v4.sampling import Sampler
from v4.settings import Scope, Settings
from v4.tokenizer import Tokenizer

NUMERICS = ("exact", "reference", "stored")


def plan_settings(
    config: Config, checkpoint: Checkpoint, ops: SimpleNamespace, dtype: torch.dtype, numerics: str, fmt: Format
) -> Settings:
    """How the graph is built for a checkpoint as stored: weights are dequantised only under numerics="exact"."""
    if numerics not in NUMERICS:
        raise ValueError(
            f"numerics={numerics!r}: expected 'exact' (nothing quantised), 'reference' (the official round trips) or 'stored' (products as "
            "the weights are stored, nothing else rounded)"
        )
    int8 = config.expert_dtype == "int8"
    if int8 and numerics == "reference":
        raise ValueError("numerics='reference' needs the hub's FP8 and FP4 weights; this checkpoint is INT8: use numerics='stored' or 'exact'")
    if numerics == "exact":
        return Settings(config, ops, dtype, format=fmt)
    packed = checkpoint.dtype_of("layers.0.attn.wq_a.weight")
    linears = "int8" if int8 else "fp8" if packed == "F8_E4M3" else "dense"
    experts = checkpoint.dtype_of("layers.0.ffn.experts.0.w1.weight")
    kind = "int8" if int8 else {"I8": "fp4", "F8_E4M3": "fp8"}.get(experts, "dense")
    return Settings(config, ops, dtype, linears=linears, simulate=numerics == "reference", experts=kind, format=fmt)


def parameter_bytes(model: Model) -> int:
    """Bytes that the model's parameters take once materialised."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@dataclass
class LoadedModel:
    """A model ready to run; `report` tells how it was loaded, `binding` which implementation each op uses."""

    config: Config
    runner: Runner
    binding: Binding
    backend: str
    report: LoadReport
    max_context: int
    tokenizer: Tokenizer | None = None
    prompt_texts: PromptTexts | None = None

    def _check_ids(self, ids: Seq[int] | Tensor) -> list[int]:
        found = torch.as_tensor(ids, device=None if isinstance(ids, Tensor) else HOST).reshape(-1).tolist()
        if not found:
            raise ValueError("found no token ids, expected at least one")
        if min(found) < 0 or max(found) >= self.config.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.config.vocab_size}); found {min(found)} to {max(found)}")
        if len(found) > self.max_context:
            raise ValueError(
                f"context of {len(found)} tokens: this model was loaded for {self.max_context}; raise max_context or shorten"
            )
        return found

    def logits(self, ids: Seq[int] | Tensor, chunks: Seq[int] | None = None) -> Tensor:
        """Logits fp32 [T, V] of one sequence; `chunks` splits the prefill into calls of these lengths (default one call).

        ValueError when the chunk lengths are not positive or do not add up to T.
        """
        found = self._check_ids(ids)
        parts = list(chunks) if chunks is not None else [len(found)]
        if any(n < 1 for n in parts) or sum(parts) != len(found):
            raise ValueError(f"chunks {parts} must be positive and add up to the {len(found)} token ids")
        cache = self.runner.session(max_tokens=len(found), max_chunk=max(parts)).cache
        sequence, rows, start = cache.new_sequence(), [], 0
        for n in parts:
            rows.append(self.runner.forward(cache, [sequence], [found[start : start + n]]))
            start += n
        return self.runner.logits(torch.cat(rows))

    def logits_batch(self, batch: Seq[Seq[int] | Tensor]) -> list[Tensor]:
        """Logits [T_b, V] of several sequences computed in one ragged call."""
        found = [self._check_ids(ids) for ids in batch]
        if not found:
            raise ValueError("found an empty batch, expected at least one sequence")
        longest = max(map(len, found))
        cache = self.runner.session(max_tokens=longest, max_sequences=len(found), max_chunk=longest).cache
        streams = self.runner.forward(cache, [cache.new_sequence() for _ in found], found)
        return list(self.runner.logits(streams).split([len(f) for f in found]))

    def generate(
        self,
        ids: Seq[int] | Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        speculative: bool | int = False,
        stop: Seq[int] | None = None,
        chunk: int = 2048,
        on_token: Callable[[int], None] | None = None,
        progress: Callable[[int], None] | None = None,
        recorded: bool = False,
    ) -> GenerateResult:
        """Continue a prompt. `speculative`: draft tokens per step (True: 1), greedy only. `stop`: ids that end the text
        (default: the end-of-sentence id). `recorded`: decoding steps are recorded by the backend once and replayed; the same tokens.
        Further errors as `logits`; with `recorded` also those of `replayed_of`, ValueError for speculation, and NotRecordable (a
        ValueError with the places) when a step needs the host."""
        if recorded and speculative:
            raise ValueError("recorded steps are single tokens: turn speculation off or do not record")
        runner = Runner(self.runner.model, replayed_of(self.backend)) if recorded else self.runner
        found = self._check_ids(ids)
        if len(found) + max_new_tokens > self.max_context:
            raise ValueError(
                f"prompt of {len(found)} and {max_new_tokens} new tokens exceed the context of {self.max_context}; "
                "shorten the prompt, ask for fewer tokens, or raise max_context"
            )
        sampler = Sampler(self.runner.model.end_ops, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        return generate(
            runner,
            found,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop=frozenset([self.config.eos_token_id] if stop is None else stop),
            speculative=int(speculative),
            chunk=chunk,
            on_token=on_token,
            progress=progress,
        )

    def explain(self) -> str:
        """Table of ops, the implementation each one uses, and the reasons of those that were refused."""
        return self.binding.explain()


def replayed_of(backend: str) -> Replayed:
    """How a backend replays recorded steps. ValueError when it does not."""
    found: Replayed | None = getattr(load_backend(backend), "replayed", None)
    if found is None:
        raise ValueError(f"backend {backend!r} does not record steps; leave recording off")
    return found


def _refuse_too_large(needed: int, available: int | None, what: str) -> None:
    if available is not None and needed > available:
        raise ValueError(
            f"{what} need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of memory are available; "
            "use a smaller dtype, keep the weights packed (numerics='reference'), or split the model over more ranks"
        )


def load(
    path: str | Path,
    *,
    backend: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    numerics: str = "exact",
    ops: Mapping[str, str] | None = None,
    strict: bool = False,
    batch_invariant: bool = False,
    checked: bool = False,
    max_context: int | None = None,
    cache_format: Format = Format(),
    mtp: bool = True,
    progress: bool = False,
    scope: Scope | None = None,
) -> LoadedModel:
    """Load a checkpoint directory (hub format, or the same names stored plainly) for one backend.

    dtype: activation type. numerics: "exact" computes without quantisation simulation, "reference" with the official
    code's FP8/FP4 round trips, "stored" with weights and activations of the products as the checkpoint stores them and nothing else
    rounded. ops: op -> backend overrides. strict: no fallback to plain torch. batch_invariant: results of
    a token do not depend on what else is in flight, bitwise. checked: validate every op call. scope: (place, ops) -> the ops used
    by that part of the model ("layers.3", "mtp.0", "head"), for recorders and planted faults. Raises CheckpointError for damaged
    files, NoImplementation with reasons, ValueError for a model that does not fit the memory or a wrong argument.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    limit = max_context or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise ValueError(f"max_context {limit} exceeds the model's max_position_embeddings {config.max_position_embeddings}")
    chain = chain_of(backend, strict=strict, batch_invariant=batch_invariant)
    binding = bind(chain, dtype=dtype, overrides=ops, checked=checked)
    module = load_backend(backend)
    settings = replace(plan_settings(config, checkpoint, binding.ops, dtype, numerics, cache_format), scope=scope)
    if numerics == "stored" and hasattr(module, "kinds"):
        linears, experts = module.kinds(settings.linears, settings.experts)
        settings = replace(settings, linears=linears, experts=experts)
    if hasattr(module, "refusal") and (why := module.refusal(settings.linears, settings.experts)) is not None:
        raise ValueError(f"{path}: {why}")
    model = Model(settings, mtp=mtp and checkpoint.has_mtp)
    _refuse_too_large(parameter_bytes(model), module.memory_available(), "the weights")
    report = load_parameters(model, checkpoint, dtype=dtype, device=module.DEVICE, progress=progress, include_mtp=mtp)
    if hasattr(module, "prepare"):
        module.prepare(model)
    tokenizer = Tokenizer(checkpoint.path) if (checkpoint.path / "tokenizer.json").is_file() else None
    texts = PromptTexts.from_checkpoint(checkpoint.path)
    return LoadedModel(config, Runner(model), binding, backend, report, limit, tokenizer, texts)
