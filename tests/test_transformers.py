"""The whole model against transformers' DeepseekV4, which is independent code: same weights through our saved checkpoints, fp32.

Both sides compute the same formulas in fp32 without quantisation simulation; 2e-5 of the largest logit is the allowance,
about twenty times the difference between two of transformers' own ways to compute the same logits.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import v4

pytest.importorskip("transformers", minversion="5.23")
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tests import clear, oracle, tiny

ALLOWED = 2e-5
NAMES = [name for name in tiny.MODELS if name != "no-choices"]
RAGGED = (1, 130, 300, 17, 3)


def ids_of(name: str) -> list[int]:
    return list(clear.prompts(name)[0])


@functools.cache
def theirs(name: str) -> DeepseekV4ForCausalLM:
    return oracle.hf_model(tiny.checkpoint(name))


@functools.cache
def ours(name: str) -> v4.LoadedModel:
    return v4.load(tiny.checkpoint(name), backend="cpu", dtype=torch.float32, numerics="exact")


@functools.cache
def expected(name: str) -> Tensor:
    return oracle.hf_logits(theirs(name), ids_of(name))


def error(found: Tensor, golden: Tensor) -> float:
    """Largest difference in units of the largest logit; infinite where shapes differ or a value is not finite."""
    if found.shape != golden.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - golden).abs().max() / golden.abs().max())


# ---- the oracle itself -------------------------------------------------------------------------------------------------------


def test_oracle_decodes_e4m3_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found, golden = oracle.decode_e4m3(codes), codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(found.nan_to_num(nan=1e9), golden.nan_to_num(nan=1e9))


def test_oracle_decodes_scales_and_nibbles() -> None:
    assert oracle.decode_e8m0(torch.tensor([127, 0, 118, 254], dtype=torch.uint8)).tolist() == [1.0, 2.0**-127, 2.0**-9, 2.0**127]
    with pytest.raises(ValueError, match="NaN"):
        oracle.decode_e8m0(torch.tensor([255], dtype=torch.uint8))
    assert oracle.decode_fp4(torch.tensor([[0x2F, 0x90]], dtype=torch.uint8)).tolist() == [[-6.0, 1.0, 0.0, -0.5]]


@pytest.mark.parametrize("name", NAMES)
def test_oracle_config_is_what_transformers_reads_from_the_hub_form(name: str) -> None:
    own = {"architectures", "model_type", "torch_dtype", "quantization_config", "expert_dtype"}
    automatic = DeepseekV4Config(**{k: v for k, v in tiny.MODELS[name][0].items() if k not in own})
    explicit = oracle.hf_config(tiny.MODELS[name][0])
    for field in ("layer_types", "mlp_layer_types", "compress_rates", "qk_rope_head_dim"):
        assert getattr(explicit, field) == getattr(automatic, field), field
    for kind in ("main", "compress"):
        mine, other = explicit.rope_parameters[kind], automatic.rope_parameters[kind]
        assert {k: float(other[k]) if k != "rope_type" else other[k] for k in mine} == {
            k: float(x) if k != "rope_type" else x for k, x in mine.items()
        }


def test_oracle_refuses_missing_and_unknown_tensors() -> None:
    directory = tiny.checkpoint("flash")
    config, tensors = oracle.read_config(directory), oracle.read_checkpoint(directory)
    with pytest.raises(ValueError, match="unknown tensor layers.0.attn.novel"):
        oracle.build(config, {**tensors, "layers.0.attn.novel": torch.zeros(1)})
    del tensors["layers.2.attn.indexer.wq_b.weight"]
    with pytest.raises(RuntimeError, match="indexer.q_b_proj"):
        oracle.build(config, tensors)


# ---- what the inputs exercise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inputs_exercise_every_mechanism_and_stay_clear_of_ties(name: str) -> None:
    model, config = theirs(name), tiny.MODELS[name][0]
    with oracle.Margins(model) as margins:
        oracle.hf_logits(model, ids_of(name))
    assert min(margins.experts, margins.entries) > 0.9 * clear.MARGIN
    state = model.state_dict()
    for n, t in state.items():
        if n.endswith(("sinks", "position_bias", "e_score_correction_bias", "base")):
            assert float(t.abs().mean()) > 1e-3, f"{n} is zero: it would not be tested"
    if 4 in config["compress_ratios"]:
        assert margins.selecting >= 200, "index_topk hardly ever selects"
    assert tiny.LENGTH >= 2 * 128 > config["sliding_window"]
    if any(config["compress_ratios"]):
        frequencies = model.model.rotary_emb.compress_inv_freq
        plain = config["compress_rope_theta"] ** (-torch.arange(0, config["qk_rope_head_dim"], 2) / config["qk_rope_head_dim"])
        assert float((frequencies / plain).min()) < 0.1, "YaRN does not change the frequencies"
    gates = "mlp.gate.tid2eid", "mlp.gate.e_score_correction_bias"
    assert [sum(n.endswith(g) for n in state) for g in gates] == [
        config["num_hash_layers"],
        config["num_hidden_layers"] - config["num_hash_layers"],
    ]


# ---- comparisons -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_shot(name: str) -> None:
    assert error(ours(name).logits(ids_of(name)), expected(name)) <= ALLOWED


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, tiny.LENGTH - 1), max_size=12))
def test_any_chunking(name: str, cuts: set[int]) -> None:
    chunks = [b - a for a, b in itertools.pairwise([0, *sorted(cuts), tiny.LENGTH])]
    assert error(ours(name).logits(ids_of(name), chunks=chunks), expected(name)) <= ALLOWED


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token(name: str) -> None:
    ids = ids_of(name)
    found = ours(name).logits(ids, chunks=[1] * len(ids))
    assert error(found, expected(name)) <= ALLOWED
    # their decode through their cache, from inside a CSA and an HCA block across the second entry of HCA
    assert error(found[:264], oracle.hf_logits(theirs(name), ids[:264], [234] + [1] * 30)) <= ALLOWED


@pytest.mark.parametrize("name", NAMES)
def test_ragged_batch(name: str) -> None:
    batch = [list(ids[:n]) for n, ids in zip(RAGGED, clear.prompts(name), strict=False)]
    for ids, found in zip(batch, ours(name).logits_batch(batch), strict=True):
        assert error(found, oracle.hf_logits(theirs(name), ids)) <= ALLOWED


@pytest.mark.parametrize("name", ["flash", "pro", "learned"])
def test_mtp_block(name: str) -> None:
    ids, model = ids_of(name), ours(name)
    session = model.runner.session(max_tokens=len(ids), max_chunk=len(ids), drafts=True)
    assert session.draft_cache is not None
    streams = model.runner.forward(session.cache, [session.cache.new_sequence()], [ids])
    drafted = model.runner.draft(session.draft_cache, session.draft_cache.new_sequence(), ids[1:], streams[:-1])
    golden = oracle.hf_mtp_logits(tiny.checkpoint(name), theirs(name), ids)
    assert error(model.runner.draft_logits(drafted), golden) <= ALLOWED
