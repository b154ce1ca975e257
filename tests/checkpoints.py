"""Checkpoints for tests: made once per run, read by plain safetensors, damaged on purpose, and modules that look like the model."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ops.quant import dequant_fp8_block, dequant_mxfp4
from tests import tiny
from v4.checkpoint import TORCH_TYPES, Checkpoint
from v4.config import Config
from v4.errors import CheckpointError
from v4.load import load_parameters
from v4.make import make
from v4.tensors import checkpoint_tensors
from v4.verify import verify

_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_groups": 2,
    "o_lora_rank": 32, "index_n_heads": 32, "index_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "num_hash_layers": 1,
}  # fmt: skip
CONFIG = Config.from_dict(tiny.config([0, 4, 128], **_SIZES))
"""One layer of each kind; widths that are no multiples of 128."""
WIDE = Config.from_file(Path(__file__).parents[1] / "configs" / "tiny.json")
"""Widths that are multiples of 128, so that everything can stay packed."""
EXPERT = "layers.1.ffn.experts.2.w1"
SHARD = "model-00003-of-00006.safetensors"
"""The file of layer 1 of CONFIG; the embedding is the first shard."""
EXTRA = {"encoding/encoding.py": b"TEXT = 'own'\n"}

Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="v4-checkpoints-")


def sound(config: Config = CONFIG, storage: str = "hub", values_from: str | None = None) -> Path:
    """A checkpoint of seed 0, removed when the interpreter ends; not to be changed."""
    path = Path(_folder().name) / f"{config.hidden_size}-{storage}-{values_from}"
    if not path.exists():
        make(config, path, 0, storage=storage, values_from=values_from, extra_files=EXTRA)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], shard: str = SHARD) -> None:
    """Change the tensors of a shard and write it again, well formed."""
    tensors = {k: v.clone() for k, v in load_file(path / shard).items()}
    change(tensors)
    save_file(tensors, path / shard)


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def module(parameters: Parameters) -> nn.Module:
    root = nn.Module()
    for name, (shape, dtype) in parameters.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
    return root


def parameters_of(config: Config, dtype: torch.dtype, *, packed: bool = False, mtp: bool = True) -> Parameters:
    """Names, shapes and types of the model's parameters, dense in `dtype` or packed as stored."""
    e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    always_fp32 = {s.name for s in checkpoint_tensors(config) if s.dtype == "F32"}
    found: Parameters = {}
    for spec in checkpoint_tensors(config, "hub" if packed else "f32"):
        name, kind = spec.name, TORCH_TYPES[spec.dtype]
        if name.startswith("mtp.") and not mtp:
            continue
        own = kind if spec.dtype in ("I64", "F8_E4M3", "F8_E8M0") or name in always_fp32 else dtype
        if ".shared_experts.w1." in name:
            found[name.replace(".w1.", ".w13.")] = ((2 * spec.shape[0], spec.shape[1]), own)
        elif name.endswith(".attn.wo_a.weight"):
            found[name[: -len(".weight")]] = ((config.o_groups, config.o_lora_rank, spec.shape[1]), dtype)
        elif not (".experts." in name or ".shared_experts.w3." in name or ".attn.wo_a." in name):
            found[name] = (spec.shape, own)
    for block in {n.partition("ffn.")[0] for n in found if "ffn.gate" in n}:
        w, half = (torch.uint8, 2) if packed else (dtype, 1)
        found[f"{block}ffn.experts.w13"] = ((e, 2 * i, d // half), w)
        found[f"{block}ffn.experts.w2"] = ((e, d, i // half), w)
        if packed:
            found[f"{block}ffn.experts.s13"] = ((e, 2 * i, d // 32), torch.float8_e8m0fnu)
            found[f"{block}ffn.experts.s2"] = ((e, d, i // 32), torch.float8_e8m0fnu)
    return found


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors by plain safetensors."""
    return {k: v for shard in sorted(path.glob("*.safetensors")) for k, v in load_file(shard).items()}


def expected_dense(path: Path) -> dict[str, Tensor]:
    """Every weight in fp32 under its hub name, dequantised by the contracts' references."""
    tensors, dense = stored(path), {}
    for name, t in tensors.items():
        scale = tensors.get(name[: -len("weight")] + "scale") if name.endswith(".weight") else None
        if scale is None:
            dense[name] = t if t.dtype is torch.int64 else t.float() if t.dtype is not torch.float8_e8m0fnu else t
        elif t.dtype is torch.int8:
            dense[name] = dequant_mxfp4.reference(t.view(torch.uint8), scale, dtype=torch.float32)
        else:
            dense[name] = dequant_fp8_block.reference(t, scale, dtype=torch.float32)
    return dense


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def check(error: CheckpointError, kind: str, file: str, tensor: str | None, found: str, expected: str) -> None:
    assert (error.kind, error.file, error.tensor) == (kind, file, tensor), error
    assert found in error.found, error
    assert expected in error.expected, error
    for part in (kind, file, tensor or "", found, expected):
        assert part in str(error)


def refused(path: Path, kind: str, *, file: str = SHARD, tensor: str | None, found: str, expected: str) -> CheckpointError:
    """The damage is refused when the checkpoint is opened, and listed by verify in the same words."""
    with pytest.raises(CheckpointError) as info:
        Checkpoint(path)
    check(info.value, kind, file, tensor, found, expected)
    check(next(f for f in verify(path).findings if f.kind == kind), kind, file, tensor, found, expected)
    return info.value


def refused_at_load(path: Path, kind: str, *, file: str = SHARD, tensor: str, found: str, expected: str) -> None:
    """Headers are sound, values are not: loading refuses, verify lists it in the same words."""
    checkpoint = Checkpoint(path)
    with pytest.raises(CheckpointError) as info:
        load_parameters(module(parameters_of(CONFIG, torch.float32)), checkpoint, dtype=torch.float32)
    check(info.value, kind, file, tensor, found, expected)
    check(next(f for f in verify(path).findings if f.kind == kind), kind, file, tensor, found, expected)
