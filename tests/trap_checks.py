"""Checks that notice the specification's ten traps; each returns its error in units of what it allows.

Golden values come from transformers where it covers the mechanism, and from formulas written out of the specification where
it does not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

import v4
from tests import clear, oracle, spec_formulas, tiny

NAME = "flash"


@functools.cache
def _loaded(numerics: str) -> v4.LoadedModel:
    return v4.load(tiny.checkpoint(NAME), backend="cpu", dtype=torch.float32, numerics=numerics)


def model(numerics: str = "exact") -> v4.LoadedModel:
    """The model that checks run and faults are planted in."""
    return _loaded(numerics)


@functools.cache
def peer() -> DeepseekV4ForCausalLM:
    return oracle.hf_model(tiny.checkpoint(NAME))


@functools.cache
def tensors() -> dict[str, Tensor]:
    return oracle.read_checkpoint(tiny.checkpoint(NAME))


def ids() -> list[int]:
    return list(clear.prompts(NAME)[0])


@functools.cache
def golden_logits() -> Tensor:
    return oracle.hf_logits(peer(), ids())


@functools.cache
def golden_mtp() -> Tensor:
    return oracle.hf_mtp_logits(tiny.checkpoint(NAME), peer(), ids())


def frequencies() -> Tensor:
    return peer().model.rotary_emb.compress_inv_freq


def distance(found: Tensor, golden: Tensor) -> float:
    return float((found - golden).abs().max() / golden.abs().max()) if bool(torch.isfinite(found).all()) else float("inf")


def spread(found: Tensor, golden: Tensor) -> float:
    """Relative distance in the 2-norm: single values on a rounding boundary hardly count, a wrong scale does."""
    return float((found.double() - golden.double()).norm() / golden.double().norm())


def record(m: v4.LoadedModel, op: str) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any], Any]], pytest.MonkeyPatch]:
    """Calls of a bound op while the model computes the test sequence: arguments, keywords, result."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    fn = getattr(m.binding.ops, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = fn(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(m.binding.ops, op, call)
    return calls, patch


def logits_equal_transformers() -> float:
    return distance(model().logits(ids()), golden_logits()) / 2e-5


def freshly_loaded_logits_equal_transformers() -> float:
    fresh = v4.load(tiny.checkpoint(NAME), backend="cpu", dtype=torch.float32, numerics="exact")
    return distance(fresh.logits(ids()), golden_logits()) / 2e-5


def mtp_logits_equal_transformers() -> float:
    m, prompt = model(), ids()
    session = m.runner.session(max_tokens=len(prompt), max_chunk=len(prompt), drafts=True)
    assert session.draft_cache is not None
    streams = m.runner.forward(session.cache, [session.cache.new_sequence()], [prompt])
    drafted = m.runner.draft(session.draft_cache, session.draft_cache.new_sequence(), prompt[1:], streams[:-1])
    return distance(m.runner.draft_logits(drafted), golden_mtp()) / 2e-5


def comb_is_the_matrix_of_section_16() -> float:
    """With fn = 0 the mixing weights are base alone: Z goes in, the published matrix comes out."""
    z = 8 * torch.tensor([[0, 1, 2, 3], [1, 0, -1, 2], [0.5, 0.5, 0, -2], [3, 1, -1, 0]])
    golden = torch.tensor(
        [
            [0.00000, 0.00096, 0.91120, 0.08075],
            [0.00928, 0.01092, 0.03084, 0.91925],
            [0.00278, 0.98773, 0.05685, 0.00000],
            [0.98794, 0.00039, 0.00110, 0.00000],
        ]
    )
    base = torch.cat([torch.zeros(8), z.flatten()])
    streams = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    _, _, comb = model().binding.ops.hc_pre(
        streams, torch.zeros(24, 64), torch.ones(3), base, norm_eps=1e-6, hc_eps=1e-6, iters=20
    )
    columns = float((comb.sum(1) - 1).abs().max()) / 1e-5
    return max(float((comb - golden).abs().max()) / 1e-5, columns)


def indexer_follows_the_formula() -> float:
    """Queries, keys and choices of a CSA layer under numerics="reference": Hadamard and FP4 on both sides, -1 where nothing
    is left."""
    m = model("reference")
    number = m.runner.model.ratios.index(4)
    layer, prefix = m.runner.model.get_submodule(f"layers.{number}.attn.indexer"), f"layers.{number}.attn.indexer."
    inputs: list[tuple[Any, ...]] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    calls, patch = record(m, "index_topk")
    try:
        m.logits(ids())
    finally:
        handle.remove()
        patch.undo()
    x_TD, qr = inputs[0][:2]
    if not isinstance(qr, Tensor):
        per_group = oracle.decode_e8m0(qr.scales).repeat_interleave(128, -1)
        qr = oracle.decode_e4m3(qr.values) * per_group[:, : qr.values.shape[-1]]
    (q_THd, w_TH, cache, table, *_), keywords, chosen_TK = calls[0]
    own = {n[len(prefix) :]: x for n, x in tensors().items() if n.startswith(prefix)}
    positions = torch.arange(len(x_TD))
    q = (qr @ own["wq_b.weight"].T).view(q_THd.shape)
    golden_q = spec_formulas.fp4(spec_formulas.hadamard(spec_formulas.rope(q, positions, frequencies())))
    names = ("compressor.wkv.weight", "compressor.wgate.weight", "compressor.ape", "compressor.norm.weight")
    wkv, wgate, ape, norm = (own[n] for n in names)
    keys = spec_formulas.csa_entries(x_TD, wkv, wgate, ape, norm, frequencies())
    golden_keys = spec_formulas.fp4(spec_formulas.hadamard(keys))
    rows = torch.arange(len(keys))
    found_keys = cache[table[0].long()[rows // cache.shape[1]], rows % cache.shape[1]]
    worst = max(spread(q_THd, golden_q), spread(found_keys, golden_keys)) / 1e-3

    scores, topk = spec_formulas.index_scores(q_THd, w_TH, found_keys), keywords["topk"]
    for row, chosen in zip(scores, chosen_TK.long(), strict=True):
        visible = int(torch.isfinite(row).sum())
        taken = chosen[chosen >= 0]
        if len(taken) != min(topk, visible) or len(set(taken.tolist())) != len(taken) or bool((taken >= visible).any()):
            return float("inf")
        if visible > topk:
            refused = row[:visible].index_fill(0, taken, float("-inf")).max()
            worst = max(worst, float((refused - row[taken].min()) / row[:visible].abs().max()) / 1e-5)
    return worst


def experts_follow_the_formula() -> float:
    """Every routed expert of a learned layer under numerics="reference", FP8 rounding of its two inputs included."""
    m = model("reference")
    number = len(m.runner.model.layers) - 1
    calls, patch = record(m, "grouped_experts_fp4")
    try:
        m.logits(ids())
    finally:
        patch.undo()
    (rows_AD, weight_A, counts_E, *_), keywords, found_AD = calls[number]
    golden, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        w1, w3, w2 = (tensors()[f"layers.{number}.ffn.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
        part = slice(start, start + count)
        golden.append(spec_formulas.expert(rows_AD[part].float(), weight_A[part], w1, w3, w2, keywords["limit"]))
        start += count
    return spread(found_AD, torch.cat(golden)) / 1e-3
