"""The training model's parameters as a checkpoint: hub names, stored as the hub does or plainly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tools.nano.model import Nano
from tools.nano.tokenizer import config_file
from v4.config import Config
from v4.packing import quantise_fp4, quantise_fp8
from v4.prompt_own import own_texts_file
from v4.save import SaveReport, save
from v4.tensors import checkpoint_tensors


def named(model: Nano) -> dict[str, Tensor]:
    """Hub name -> fp32 values [as the logical shape]; tables int64."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu()
        head, _, last = name.rpartition(".")
        if head.endswith((".hc_attn", ".hc_ffn", "hc_head")):
            out[f"{head}_{last}"] = value
        elif head.endswith(".experts"):
            out.update({f"{head}.{e}.{last}.weight": value[e] for e in range(value.shape[0])})
        elif last == "wo_a":
            out[f"{name}.weight"] = value
        else:
            out[name] = value
    return out


def tensors(model: Nano, storage: str) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors in file order. ValueError for a parameter that the format lacks, or the reverse."""
    values = named(model)
    specs = [s for s in checkpoint_tensors(model.config, storage) if s.dtype != "F8_E8M0"]
    if missing := {s.name for s in specs} ^ set(values):
        raise ValueError(f"parameters and checkpoint names differ: {sorted(missing)[:5]}")
    for spec in specs:
        value = values[spec.name]
        if spec.dtype in ("F8_E4M3", "I8"):
            # bf16 first, as real checkpoints are quantised
            weight, scale = (quantise_fp8 if spec.dtype == "F8_E4M3" else quantise_fp4)(value.bfloat16())
            yield spec.name, weight.view(torch.int8) if spec.dtype == "I8" else weight
            yield spec.name[: -len("weight")] + "scale", scale
        else:
            yield spec.name, value.to({"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}[spec.dtype]).contiguous()


def plain(config: Config) -> Config:
    """The configuration of the same model stored in fp32."""
    return replace(config, weight_block_size=None, expert_dtype="fp32", torch_dtype="float32")


def export(model: Nano, out: str | Path, *, storage: str = "hub", tokenizer: str | Path | None = None) -> SaveReport:
    """Write a checkpoint directory (replacing one that is there). storage: "hub" or "f32". Errors as `v4.save.save`."""
    files = {"encoding/encoding_v4.py": own_texts_file()}
    if tokenizer is not None:
        files |= {"tokenizer.json": Path(tokenizer).read_bytes(), "tokenizer_config.json": config_file()}
    config = model.config if storage == "hub" else plain(model.config)
    return save(tensors(model, storage), config, out, extra_files=files, overwrite=True)
