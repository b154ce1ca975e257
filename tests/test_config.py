"""Configurations: the published ones, both spellings, and everything that must be refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from v4.config import Config, ConfigError
from v4.tensors import checkpoint_tensors

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = ("flash", "pro", "nano", "mini", "tiny")
FLASH_REFERENCE: dict[str, Any] = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000.0,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000.0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}


def values(name: str = "flash", **changes: Any) -> dict[str, Any]:
    """The hub form of a named configuration with some keys changed; None removes a key."""
    found = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {k: v for k, v in found.items() if v is not None}


@pytest.mark.parametrize("name", NAMES)
def test_named_configs_survive_writing_and_reading(name: str) -> None:
    config = Config.from_file(CONFIGS / f"{name}.json")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hub = values(name)
    assert {k: v for k, v in config.to_dict().items() if hub[k] != v} == {}


@pytest.mark.parametrize(
    ("name", "window", "csa", "hca", "experts", "topk"),
    [
        ("flash", [0, 1], list(range(2, 43, 2)), list(range(3, 42, 2)), 256, 512),
        ("pro", [], list(range(2, 61, 2)), [0, 1, *range(3, 60, 2)], 384, 1024),
    ],
)
def test_layers_of_the_published_models(
    name: str, window: list[int], csa: list[int], hca: list[int], experts: int, topk: int
) -> None:
    c = Config.from_file(CONFIGS / f"{name}.json")
    kinds = {m: [i for i in range(c.num_hidden_layers) if c.ratio(i) == m] for m in (0, 4, 128)}
    assert kinds == {0: window, 4: csa, 128: hca}
    assert c.ratio(c.num_hidden_layers) == 0
    assert [i for i in range(c.num_hidden_layers) if c.is_hash(i)] == [0, 1, 2]
    assert (c.n_routed_experts, c.index_topk) == (experts, topk)
    assert c.num_attention_heads * c.head_dim // c.o_groups == 4096


def test_mini_is_the_size_that_the_measurements_need() -> None:
    c = Config.from_file(CONFIGS / "mini.json")
    assert c.compress_ratios == (0, 0, 4, 128, 4, 128, 4)
    assert (c.hidden_size, c.n_routed_experts, c.num_experts_per_tok) == (1024, 32, 6)
    assert (c.num_attention_heads, c.head_dim, c.index_n_heads, c.index_head_dim, c.index_topk) == (16, 256, 32, 128, 512)
    assert 380e6 < sum(t.parameters for t in checkpoint_tensors(c)) < 440e6


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_small_configs_have_every_mechanism(name: str) -> None:
    c = Config.from_file(CONFIGS / f"{name}.json")
    layers = range(c.num_hidden_layers)
    assert {c.ratio(i) for i in layers} == {0, 4, 128}
    assert {c.is_hash(i) for i in layers} == {True, False}
    assert c.num_nextn_predict_layers == 1
    assert c.hidden_size % 128 == 0 and c.moe_intermediate_size % 128 == 0


def test_the_references_spelling_means_the_same() -> None:
    hub, reference = Config.from_file(CONFIGS / "flash.json"), Config.from_dict(FLASH_REFERENCE)
    assert reference == hub


def test_the_references_spelling_is_checked_like_the_hubs() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'windw_size'; did you mean 'window_size'\?"):
        Config.from_dict({**FLASH_REFERENCE, "windw_size": 3})
    with pytest.raises(ConfigError, match="hidden_size is given twice"):
        Config.from_dict({**FLASH_REFERENCE, "hidden_size": 4096})


def test_missing_expert_dtype_means_fp4() -> None:
    assert Config.from_dict(values(expert_dtype=None)).expert_dtype == "fp4"
    inside = {**values()["quantization_config"], "expert_dtype": "fp8"}
    assert Config.from_dict(values(expert_dtype=None, quantization_config=inside)).expert_dtype == "fp8"


def test_a_plainly_stored_checkpoint_has_no_quantization() -> None:
    c = Config.from_dict(values(expert_dtype=None, quantization_config=None))
    assert (c.expert_dtype, c.weight_block_size) == ("bf16", None)
    assert Config.from_dict(c.to_dict()) == c


def test_dspark_variants_are_read_and_marked() -> None:
    extra = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [40, 41, 42]}
    c = Config.from_dict(values(**extra, dspark_markov_rank=256, compress_ratios=[*values()["compress_ratios"], 0, 0]))
    assert c.dspark
    assert not Config.from_dict(values()).dspark


def test_ratios_may_stop_at_the_last_layer() -> None:
    c = Config.from_dict(values(compress_ratios=values()["compress_ratios"][:43]))
    assert c.ratio(42) == 4
    assert c.ratio(43) == 0


QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
SCALING = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v41"}, "V4.1 is another architecture"),
    ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3', expected 'deepseek_v4'"),
    ({"slidng_window": 128}, r"unknown key 'slidng_window'; did you mean 'sliding_window'\?"),
    ({"kv_source_layer_ids": [2]}, "unknown key 'kv_source_layer_ids'"),
    ({"weight_block_size": [128, 128]}, "unknown key 'weight_block_size'"),
    ({"layer_types": []}, "'layer_types': this file was rewritten by transformers"),
    ({"hidden_size": None}, "missing hidden_size"),
    ({"hidden_size": "4096"}, "hidden_size is '4096', expected an integer"),
    ({"hidden_size": 4096.5}, "hidden_size is 4096.5, expected an integer"),
    ({"hidden_size": -1}, "hidden_size is -1, expected a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"swiglu_limit": True}, "swiglu_limit is True, expected a number"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; only 'sqrtsoftplus'"),
    ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'; only 'noaux_tc'"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8; only 1"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"compress_ratios": None}, "missing compress_ratios"),
    ({"compress_ratios": 4}, "compress_ratios is 4, expected a list"),
    ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries, expected one per layer"),
    ({"compress_ratios": [0] * 46}, "compress_ratios has 46 entries"),
    ({"compress_ratios": [3, *[0] * 43]}, r"compress_ratios\[0\] is 3, expected 0"),
    ({"compress_ratios": [0, "4", *[0] * 42]}, r"compress_ratios\[1\] is '4'"),
    ({"compress_ratios": [0] * 43 + [4]}, r"compress_ratios\[43\] is 4: MTP blocks"),
    ({"num_hash_layers": 44}, "num_hash_layers is 44, more than the 43 layers"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257, more than the 256 experts"),
    ({"o_groups": 7}, "o_groups 7 does not divide num_attention_heads 64"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, expected even"),
    ({"qk_rope_head_dim": 256}, "qk_rope_head_dim is 256, expected even and at most head_dim 512 and index_head_dim 128"),
    ({"index_head_dim": 96}, "index_head_dim is 96, expected a power of two"),
    ({"eos_token_id": 129280}, "eos_token_id 129280: expected < vocab_size"),
    ({"rope_scaling": None}, "rope_scaling is absent"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ({"rope_scaling": {**SCALING, "type": "linear"}}, "rope_scaling.type is 'linear', expected 'yarn'"),
    ({"rope_scaling": {**SCALING, "mscale": 1.2773}}, "rope_scaling.mscale is 1.2773: the rotary amplitude of V4 is 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 16}}, "rope_scaling lacks original_max_position_embeddings"),
    ({"rope_scaling": {**SCALING, "factor": 0}}, "rope_scaling.factor is 0, expected a positive number"),
    ({"expert_dtype": "int4"}, "expert_dtype is 'int4', expected 'fp4'"),
    ({"quantization_config": {**QUANTIZATION, "expert_dtype": "fp8"}}, "'fp4' and quantization_config.expert_dtype is 'fp8'"),
    ({"quantization_config": None}, "expert_dtype is 'fp4' without quantization_config"),
    ({"quantization_config": {**QUANTIZATION, "quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
    ({"quantization_config": {**QUANTIZATION, "scale_fmt": "float"}}, "quantization_config.scale_fmt is 'float'"),
    ({"quantization_config": {**QUANTIZATION, "weight_block_size": [32, 32]}}, r"weight_block_size is \[32, 32\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_contradictions_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values(**changes))


def test_v32_is_another_model() -> None:
    with pytest.raises(ConfigError, match="model_type is 'deepseek_v32'"):
        Config.from_file(CONFIGS / "v32.json")


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        Config.from_file(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        Config.from_file(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: found a JSON list, expected an object"):
        Config.from_file(tmp_path)
    file.write_text(json.dumps(values(o_groups=7)))
    with pytest.raises(ConfigError, match=r"config\.json: o_groups 7 does not divide"):
        Config.from_file(file)
