"""Small models for whole-model tests: hub configurations that switch on every mechanism, made once per run as checkpoints.

Widths are tiny, but sequences of LENGTH tokens give every mechanism something to do: two complete HCA entries, 75 CSA
entries of which the indexer keeps 8 to 16, windows far shorter than the sequence, YaRN over a pre-training length of 64,
clamps within reach of the activations. 32 and more index heads keep exact score ties away (with few heads whole rows of
scores are zero after the ReLU)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from v4.config import Config
from v4.make import make

LENGTH = 300
_BASE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 8,
    "sliding_window": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 1.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 16384,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "initializer_range": 0.02,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "expert_dtype": "fp4",
}


def config(ratios: list[int], **changes: Any) -> dict[str, Any]:
    """A hub config.json with these layers (the MTP block's window-only entry is appended)."""
    return {**_BASE, "num_hidden_layers": len(ratios), "compress_ratios": [*ratios, 0], **changes}


MODELS: Mapping[str, tuple[dict[str, Any], str]] = {
    "flash": (config([0, 0, 4, 128, 4], num_hash_layers=3, moe_intermediate_size=128), "hub"),
    "pro": (
        config([128, 128, 4, 128, 4], num_hash_layers=3, o_groups=4, index_topk=16, routed_scaling_factor=2.5, sliding_window=64),
        "f32",
    ),
    "csa-first": (config([4, 128, 0, 4], index_n_heads=64, index_topk=12, qk_rope_head_dim=32), "f32"),
    "learned": (config([0, 4, 128], num_hash_layers=0, sliding_window=128, head_dim=96, num_attention_heads=8), "bf16"),
    "hashed": (config([4, 4, 128], num_hash_layers=3, hc_sinkhorn_iters=4, swiglu_limit=0.5), "hub"),
    "no-choices": (config([4, 128], num_hash_layers=2, index_topk=4096, index_n_heads=8), "f32"),
    "window-only": (config([0, 0, 0], hidden_size=96, num_experts_per_tok=1), "f32"),
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="v4-tiny-")


@functools.cache
def checkpoint(name: str, seed: int = 0) -> Path:
    """The directory of a model of MODELS, made on first use and removed when the interpreter ends."""
    settings, storage = MODELS[name]
    directory = Path(_folder().name) / f"{name}-{seed}"
    make(Config.from_dict(settings), directory, seed, storage=storage)
    return directory


def tokens(count: int = LENGTH, *, seed: int = 0, vocabulary: int = 512) -> list[int]:
    """Random token ids, the same for the same arguments."""
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
