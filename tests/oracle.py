"""A second opinion: a checkpoint directory in hub format becomes a transformers DeepseekV4 model, without any code of ours.

Decoding, names and configuration follow the specification's tables (sections 10.1, 10.3, 10.5) and use torch and safetensors
only, so that a mistake of our loader can not be repeated here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.cache_utils import DynamicCache

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_GLOBAL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{f"hc_{a}_{p}": f"{a}_hc.{p}" for a in ("attn", "ffn") for p in ("fn", "base", "scale")},
}
_SAME = [
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "q_lora_rank", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "routed_scaling_factor",
    "max_position_embeddings", "rope_theta", "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "swiglu_limit",
    "sliding_window", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "scoring_func", "norm_topk_prob", "hidden_act",
]  # fmt: skip
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def decode_e8m0(codes: Tensor) -> Tensor:
    """Exponent bytes -> fp32 powers of two 2^(b-127). ValueError for the NaN code 255."""
    b = codes.view(torch.uint8)
    if bool((b == 255).any()):
        raise ValueError("E8M0 scale 255 is NaN")
    return torch.exp2(b.double() - 127).float()


def decode_e4m3(codes: Tensor) -> Tensor:
    """e4m3fn bytes -> fp32 from the bit fields: sign, 4 exponent bits with bias 7, 3 mantissa bits, subnormals at exponent 0."""
    b = torch.arange(256, dtype=torch.float64)
    exponent, mantissa = torch.floor(b / 8) % 16, b % 8
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2(exponent - 7))
    table = torch.where(b >= 128, -value, value)
    table[[127, 255]] = float("nan")
    return table.float()[codes.view(torch.uint8).long()]


def decode_fp4(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] -> fp32 [..., K]; the low nibble is the even element."""
    b = packed.view(torch.uint8)
    nibbles = torch.stack([b & 15, b >> 4], dim=-1).flatten(-2).long()
    return torch.where(nibbles >= 8, -1.0, 1.0) * _FP4[nibbles & 7]


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """A stored weight with its scale companion -> fp32: FP8 in 128x128 blocks, or packed FP4 in groups of 32 along K."""
    s = decode_e8m0(scale)
    if weight.dtype == torch.float8_e4m3fn:
        w = decode_e4m3(weight)
        return w * s.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    return decode_fp4(weight) * s.repeat_interleave(32, 1)


def read_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """Every tensor of the directory's shards under its hub name, dequantised; floating tensors fp32, tables int64."""
    stored: dict[str, Tensor] = {}
    for shard in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(str(shard), framework="pt") as f:
            names = f.keys()
            stored.update((name, f.get_tensor(name)) for name in names)
    scales = {n for n in stored if n.endswith(".scale")}
    result: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name in scales:
            if name[: -len("scale")] + "weight" not in stored:
                raise ValueError(f"{name}: a scale without its weight")
            continue
        companion = name[: -len("weight")] + "scale" if name.endswith(".weight") else ""
        if companion in scales:
            result[name] = dequantise(tensor, stored[companion])
        else:
            # a copy: tensors that stay mapped to the file may be unaligned, which slows products down
            result[name] = (tensor if tensor.dtype == torch.int64 else tensor.float()).clone()
    return result


def hf_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hub names -> transformers names (section 10.5); experts stacked, `mtp.*` dropped. ValueError for an unknown name."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        if name in _GLOBAL:
            state[_GLOBAL[name]] = tensor
            continue
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if not found:
            raise ValueError(f"unknown tensor {name}")
        layer, rest = f"model.layers.{found[1]}.", found[2]
        if expert := re.fullmatch(r"ffn\.experts\.(\d+)\.(w[123])\.weight", rest):
            experts.setdefault(layer, {}).setdefault(int(expert[1]), {})[expert[2]] = tensor
        elif rest in _LAYER:
            state[layer + _LAYER[rest]] = tensor
        else:
            raise ValueError(f"unknown tensor {name}")
    for layer, by_number in experts.items():
        rows = [by_number[e] for e in range(len(by_number))]
        state[layer + "mlp.experts.gate_up_proj"] = torch.stack([torch.cat([r["w1"], r["w3"]]) for r in rows])
        state[layer + "mlp.experts.down_proj"] = torch.stack([r["w2"] for r in rows])
    return state


def hf_config(config: Mapping[str, Any]) -> DeepseekV4Config:
    """A hub config.json as transformers' configuration, every rewritten field (section 1.1) given explicitly."""
    layers = config["num_hidden_layers"]
    rotary = config["qk_rope_head_dim"] / config["head_dim"]
    yarn = dict(config.get("rope_scaling") or {})
    kind = yarn.pop("type", None) or yarn.pop("rope_type", None) or "default"
    compress = {"rope_type": kind, "rope_theta": config["compress_rope_theta"], "partial_rotary_factor": rotary}
    if kind == "yarn":
        keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        compress |= {k: yarn[k] for k in keys} | {"attention_factor": 1.0}
    fields = {k: config[k] for k in _SAME if k in config}
    return DeepseekV4Config(
        **fields,
        layer_types=[KINDS[r] for r in config["compress_ratios"][:layers]],
        mlp_layer_types=["hash_moe" if i < config["num_hash_layers"] else "moe" for i in range(layers)],
        compress_rates={KINDS[4]: 4, KINDS[128]: 128},
        partial_rotary_factor=rotary,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": config["rope_theta"], "partial_rotary_factor": rotary},
            "compress": compress,
        },
        use_cache=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], experts: str | None = "eager") -> DeepseekV4ForCausalLM:
    """transformers' model of a hub configuration with these tensors (hub names, fp32), in evaluation mode.

    experts: transformers' name of its expert implementation (None: its default). ValueError or RuntimeError when a tensor is
    missing, left over or has another shape.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its note on a YaRN factor that is not max/original
    translated = hf_config(config)
    translated._experts_implementation = experts
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(translated)
    model.load_state_dict(hf_state(tensors), strict=True, assign=True)
    for module in model.modules():
        if hasattr(module, "compute_default_rope_parameters"):  # frequencies are buffers outside the state
            for name, value in type(module)(translated).named_buffers():
                module.register_buffer(name, value, persistent=False)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"tensors without values: {left[:5]}")
    return model.requires_grad_(False).eval()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config.json."""
    return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))


def hf_model(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, experts: str | None = "eager"
) -> DeepseekV4ForCausalLM:
    """transformers' model with every tensor of the checkpoint; arguments and errors as `build`."""
    return build(read_config(directory), read_checkpoint(directory), experts).to(dtype)


@torch.inference_mode()
def hf_logits(model: DeepseekV4ForCausalLM, ids: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
    """Logits fp32 [T, V]: one shot without a cache, or through transformers' cache in calls of these lengths."""
    ids_1T = torch.as_tensor(ids)[None]
    if chunks is None:
        return model(input_ids=ids_1T, use_cache=False).logits[0].float()
    cache = DynamicCache(config=model.config)
    rows, start = [], 0
    for n in chunks:
        rows.append(model(input_ids=ids_1T[:, start : start + n], past_key_values=cache, use_cache=True).logits[0].float())
        start += n
    return torch.cat(rows)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.inference_mode()
def hf_mtp_logits(directory: str | Path, model: DeepseekV4ForCausalLM, ids: Sequence[int]) -> Tensor:
    """Logits [T-1, V] of the MTP block: row t, from the streams at t and token t+1, predicts token t+2 (section 2.3).

    transformers does not build the block. Its main model gives the four streams in front of hc_head; a one-layer model that
    carries the block's tensors as its layer gives the rest, its layer input replaced by e_proj and h_proj written out here.
    """
    config, tensors = read_config(directory), read_checkpoint(directory)
    own = {n[len("mtp.0.") :]: t for n, t in tensors.items() if n.startswith("mtp.0.")}
    extra = {n: own.pop(n) for n in ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight")}
    outer = {n: own.pop(n) for n in ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")}
    shared = {n: tensors[n] for n in ("embed.weight", "head.weight")}
    one = {**config, "num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [0]}
    block = build(one, {**shared, **outer, **{f"layers.0.{n}": t for n, t in own.items()}})

    seen: list[Tensor] = []
    with _hook(model.model.hc_head, lambda _, args: seen.append(args[0])):
        hf_logits(model, ids)
    eps, next_ids = config["rms_norm_eps"], torch.as_tensor(ids[1:])
    e_TD = _norm(tensors["embed.weight"][next_ids], extra["enorm.weight"], eps) @ extra["e_proj.weight"].T
    h_TnD = _norm(seen[0][0, :-1], extra["hnorm.weight"], eps) @ extra["h_proj.weight"].T
    with _hook(block.model.layers[0], lambda _, args: ((e_TD[:, None] + h_TnD)[None], *args[1:])):
        return hf_logits(block, ids[1:])


class _hook:
    def __init__(self, module: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_pre_hook(self.call)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


class Margins:
    """Smallest gap, relative to the largest score, between the last chosen and the first refused item of every top-k decision.

    Two fp32 implementations differ by about 1e-6 of scale in a score; a decision closer than that can fall either way and then
    moves the logits by far more than rounding. Tests assert that their inputs stay clear of such ties instead of hiding them in a
    tolerance. Use as a context manager around a one-shot forward.
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model
        self.experts = self.entries = float("inf")
        self.selecting = 0

    def _gate(self, module: Any, args: Any, output: Any) -> None:
        choice = module.score_fn(output[0]) + module.e_score_correction_bias
        best = choice.topk(module.top_k + 1, dim=-1).values
        self.experts = min(self.experts, float(((best[:, -2] - best[:, -1]) / best[:, 0].abs()).min()))

    def _scores(self, module: Any, args: Any, scores_BTE: Tensor) -> None:
        topk, entries = self.model.config.index_topk, scores_BTE.shape[-1]
        visible = (torch.arange(scores_BTE.shape[1]) + 1) // 4
        for scores, seen in zip(scores_BTE[0], visible.tolist(), strict=True):
            if min(seen, entries) > topk:
                best = scores[:seen].topk(topk + 1).values
                self.entries = min(self.entries, float((best[-2] - best[-1]) / scores[:seen].abs().max()))
                self.selecting += 1

    def __enter__(self) -> Margins:
        hooks = {"DeepseekV4TopKRouter": self._gate, "DeepseekV4IndexerScorer": self._scores}
        self._handles = [
            m.register_forward_hook(hooks[type(m).__name__]) for m in self.model.modules() if type(m).__name__ in hooks
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
