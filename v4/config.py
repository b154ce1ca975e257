"""The model's shape, read from the hub's config.json or the reference's inference/config.json.

Another model, an unknown key or a contradiction is refused by name before any weight is read.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

# reference name -> hub name (specification section 1.1)
_REFERENCE = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_mtp_layers": "num_nextn_predict_layers",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}
_REFERENCE_ROPE = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "mlp_bias": False,
}
_IGNORED = {"architectures", "attention_dropout", "use_cache", "initializer_range", "transformers_version", "pad_token_id"}
_IGNORED |= {"dtype", "scale_fmt", "scale_dtype", "auto_map", "_name_or_path", "max_batch_size", "n_dense_layers"}
_IGNORED |= {"dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"}
_QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
_INT8 = {"quant_method": "int8", "weights": "channel", "activations": "token", "activation_scheme": "dynamic"}
_REWRITTEN = {"layer_types", "mlp_layer_types", "rope_parameters", "partial_rotary_factor"}
_NOT_NEGATIVE = {"bos_token_id", "eos_token_id", "num_hash_layers", "num_nextn_predict_layers"}


class ConfigError(ValueError):
    """A configuration that is not a DeepSeek-V4 this project runs; the message names the field, what was found and expected."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters of the compressed layers' rotary table."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1


@dataclass(frozen=True)
class Config:
    """Shape of a DeepSeek-V4 model; field names are the hub's (specification section 1.1)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    compress_ratios: tuple[int, ...]
    routed_scaling_factor: float
    max_position_embeddings: int
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    swiglu_limit: float = 10.0
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str = "fp4"
    weight_block_size: tuple[int, int] | None = (128, 128)
    torch_dtype: str = "bfloat16"
    dspark: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer: 0 window only, 4 CSA, larger HCA; layers past the last are MTP blocks."""
        return self.compress_ratios[layer] if layer < len(self.compress_ratios) else 0

    def is_hash(self, layer: int) -> bool:
        """True when the layer's experts are chosen by token id."""
        return layer < self.num_hash_layers

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Read a config.json, or the one inside a checkpoint directory. ConfigError names what is wrong and where."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{file}: not found; expected a config.json of a DeepSeek-V4 checkpoint") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}: not JSON ({error}); expected a config.json") from None
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from the hub's names or the reference's. ConfigError for other models, unknown keys and contradictions."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"found a JSON {type(values).__name__}, expected an object with the fields of a config.json")
        _check_model_type(values.get("model_type", "deepseek_v4"))
        v = _hub_names(values)
        for key, expected in _FIXED.items():
            if key in v and (found := v.pop(key)) != expected:
                raise ConfigError(f"{key} is {found!r}; only {expected!r} is implemented")
        quantization = v.pop("quantization_config", None)
        # these two fields are derived: no file states them under these names
        known = {f.name for f in fields(cls)} - {"dspark", "weight_block_size"}
        for key in list(v):
            if key in _IGNORED or key == "model_type":
                del v[key]
            elif key not in known:
                raise ConfigError(_unknown(key, known))
        v["dspark"] = any(str(k).startswith("dspark") for k in values)
        _read_quantization(v, quantization)
        if v.get("rope_scaling") is not None:
            v["rope_scaling"] = _read_scaling(v["rope_scaling"])
        if isinstance(v.get("compress_ratios"), list):
            v["compress_ratios"] = tuple(v["compress_ratios"])
        if missing := [f.name for f in fields(cls) if f.name not in v and f.default is MISSING]:
            raise ConfigError(f"missing {', '.join(missing)}")
        return cls(**v)

    def to_dict(self) -> dict[str, Any]:
        """The hub's config.json."""
        d = asdict(self)
        block, dspark, scaling = d.pop("weight_block_size"), d.pop("dspark"), d.pop("rope_scaling")
        del dspark
        d["compress_ratios"] = list(self.compress_ratios)
        d["rope_scaling"] = {"type": "yarn", **scaling} if scaling else None
        head = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **_FIXED}
        del head["mlp_bias"]
        if self.expert_dtype == "int8":
            d["quantization_config"] = dict(_INT8)
        if block:
            d["quantization_config"] = {**_QUANTIZATION, "weight_block_size": list(block)}
        return {**head, **d}


def _check_model_type(kind: object) -> None:
    if kind == "deepseek_v41":
        raise ConfigError("model_type is 'deepseek_v41': V4.1 is another architecture and format; this project runs deepseek_v4")
    if kind != "deepseek_v4":
        raise ConfigError(f"model_type is {kind!r}, expected 'deepseek_v4'")


def _unknown(key: str, known: set[str]) -> str:
    if key in _REWRITTEN:
        return f"key {key!r}: this file was rewritten by transformers; use the config.json of the checkpoint's hub repository"
    near = difflib.get_close_matches(key, sorted(known | set(_FIXED) | set(_REFERENCE) | set(_REFERENCE_ROPE)), 1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; remove it")


def _hub_names(values: Mapping[str, Any]) -> dict[str, Any]:
    if "dim" not in values:
        return dict(values)
    v: dict[str, Any] = {}
    for key, value in values.items():
        hub = _REFERENCE.get(key, key)
        if hub in v:
            raise ConfigError(f"{hub} is given twice, under the hub's name and under the reference's ({key})")
        if key not in _REFERENCE_ROPE:
            v[hub] = value
    scaling = {hub: values[ref] for ref, hub in _REFERENCE_ROPE.items() if ref in values}
    if scaling:
        v["rope_scaling"] = {"type": "yarn", **scaling}
        if "max_position_embeddings" not in v and {"factor", "original_max_position_embeddings"} <= set(scaling):
            v["max_position_embeddings"] = int(scaling["original_max_position_embeddings"] * scaling["factor"])
    if v.pop("dtype", "fp8") == "fp8":
        v["quantization_config"] = {**_QUANTIZATION, "scale_fmt": v.get("scale_fmt", "ue8m0")}
    return v


def _read_quantization(v: dict[str, Any], found: Mapping[str, Any] | None) -> None:
    stated = v.get("expert_dtype")
    if found is None:
        if stated in ("fp4", "fp8", "int8"):
            raise ConfigError(f"expert_dtype is {stated!r} without quantization_config; plain experts are bf16 or fp32")
        v.setdefault("weight_block_size", None)
        v.setdefault("expert_dtype", "bf16")
        return
    # some releases keep the experts' type here instead of at the top; the first one states it nowhere and means fp4
    inner = found.get("expert_dtype")
    if stated is not None and inner is not None and stated != inner:
        raise ConfigError(f"expert_dtype is {stated!r} and quantization_config.expert_dtype is {inner!r}; they must agree")
    if found.get("quant_method") == "int8":
        if (kind := stated or inner) != "int8":
            raise ConfigError(f"quantization_config.quant_method is 'int8' and expert_dtype {kind!r}; expected 'int8' for both")
        for key, value in _INT8.items():
            if found.get(key, value) != value:
                raise ConfigError(f"quantization_config.{key} is {found[key]!r}, expected {value!r}")
        v.update(expert_dtype="int8", weight_block_size=None)
        return
    v["expert_dtype"] = stated or inner or "fp4"
    for key, value in _QUANTIZATION.items():
        if found.get(key, value) != value:
            raise ConfigError(f"quantization_config.{key} is {found[key]!r}, expected {value!r}")
    if list(found.get("weight_block_size", [128, 128])) != [128, 128]:
        raise ConfigError(f"quantization_config.weight_block_size is {found['weight_block_size']}, expected [128, 128]")
    v["weight_block_size"] = (128, 128)


def _read_scaling(found: Any) -> RopeScaling:
    if not isinstance(found, Mapping):
        raise ConfigError(f"rope_scaling is {found!r}, expected an object with type yarn and factor")
    kind = found.get("type", found.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"rope_scaling.type is {kind!r}, expected 'yarn'")
    if found.get("mscale") not in (None, 0, 1):
        raise ConfigError(f"rope_scaling.mscale is {found['mscale']!r}: the rotary amplitude of V4 is 1, remove it")
    known = [f.name for f in fields(RopeScaling)]
    if missing := [k for k in known[:2] if k not in found]:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}")
    scaling = RopeScaling(**{k: found[k] for k in known if k in found})
    for name in known:
        value = getattr(scaling, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"rope_scaling.{name} is {value!r}, expected a positive number")
    return scaling


def _check_types(c: Config) -> None:
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type == "str" and not isinstance(value, str):
            raise ConfigError(f"{f.name} is {value!r}, expected a text")
        if f.type not in ("int", "float"):
            continue
        if isinstance(value, bool) or not isinstance(value, int if f.type == "int" else (int, float)):
            raise ConfigError(f"{f.name} is {value!r}, expected {'an integer' if f.type == 'int' else 'a number'}")
        if not math.isfinite(value) or value < 0 or (value == 0 and f.name not in _NOT_NEGATIVE):
            raise ConfigError(f"{f.name} is {value}, expected a positive number")


def _check_ratios(c: Config) -> None:
    layers, mtp, ratios = c.num_hidden_layers, c.num_nextn_predict_layers, c.compress_ratios
    if not isinstance(ratios, tuple):
        raise ConfigError(f"compress_ratios is {ratios!r}, expected a list with one entry per layer")
    if len(ratios) < layers or (len(ratios) > layers + mtp and not c.dspark):
        raise ConfigError(f"compress_ratios has {len(ratios)} entries, expected one per layer ({layers}) and MTP block ({mtp})")
    for i, m in enumerate(ratios):
        if isinstance(m, bool) or not isinstance(m, int) or (m not in (0, 4) and m < 8):
            raise ConfigError(f"compress_ratios[{i}] is {m!r}, expected 0 (window), 4 (CSA) or a larger ratio such as 128 (HCA)")
        if i >= layers and m:
            raise ConfigError(f"compress_ratios[{i}] is {m}: MTP blocks attend to the window only, expected 0")
    if any(ratios) and c.rope_scaling is None and c.max_position_embeddings > 65536:
        raise ConfigError("rope_scaling is absent: compressed layers beyond 65536 positions need YaRN")


def _check(c: Config) -> None:
    _check_types(c)
    _check_ratios(c)
    if c.num_hash_layers > c.num_hidden_layers:
        raise ConfigError(f"num_hash_layers is {c.num_hash_layers}, more than the {c.num_hidden_layers} layers")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ConfigError(f"num_experts_per_tok is {c.num_experts_per_tok}, more than the {c.n_routed_experts} experts")
    if c.num_attention_heads % c.o_groups:
        raise ConfigError(f"o_groups {c.o_groups} does not divide num_attention_heads {c.num_attention_heads}")
    rope, head, index = c.qk_rope_head_dim, c.head_dim, c.index_head_dim
    if rope % 2 or rope > min(head, index):
        raise ConfigError(f"qk_rope_head_dim is {rope}, expected even and at most head_dim {head} and index_head_dim {index}")
    if c.index_head_dim & (c.index_head_dim - 1):
        raise ConfigError(f"index_head_dim is {c.index_head_dim}, expected a power of two (index keys are Hadamard-rotated)")
    if max(c.bos_token_id, c.eos_token_id) >= c.vocab_size:
        raise ConfigError(f"bos_token_id {c.bos_token_id}, eos_token_id {c.eos_token_id}: expected < vocab_size {c.vocab_size}")
    if c.expert_dtype not in ("fp4", "fp8", "int8", "bf16", "fp32"):
        raise ConfigError(f"expert_dtype is {c.expert_dtype!r}, expected 'fp4', 'fp8', 'int8', 'bf16' or 'fp32'")
    if c.expert_dtype == "int8" and c.weight_block_size:
        raise ConfigError("expert_dtype is 'int8' beside FP8 blocks: INT8 checkpoints keep every linear layer in INT8 channels")
