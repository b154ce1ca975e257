"""Random models in exactly the hub's checkpoint format, for tests, demonstrations and benchmarks.

Every tensor is drawn from its own generator, seeded by seed and name, so that neither order nor sharding matter, and the same
seed gives the same bytes on any machine: the draws are integers of a bit generator with a guaranteed stream, times a constant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v4.config import Config
from v4.packing import quantise_fp4, quantise_fp8, unpack_fp4, unpack_fp8
from v4.save import SaveReport, save
from v4.tensors import TensorSpec, checkpoint_tensors
from v4.workers import in_order, workers

_SPREAD = {
    ".ape": (0.0, 0.5),
    ".attn_sink": (0.5, 1.0),
    ".gate.bias": (0.0, 0.1),
    "_base": (0.0, 0.7),
    "_scale": (1.0, 0.2),
}
"""Name ending -> mean and standard deviation. Activations stay O(1): matrices are drawn with deviation K^-1/2 (the embedding with
1), norm weights around 1. Sinks are not zero, the selection bias moves some choices, mixing coefficients differ by stream."""


def _generator(name: str, seed: int) -> np.random.SFC64:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.SFC64(int.from_bytes(digest[:16], "little"))


def _uniform(name: str, shape: tuple[int, ...], seed: int, mean: float, deviation: float) -> Tensor:
    n = int(np.prod(shape))
    words = torch.from_numpy(_generator(name, seed).random_raw((n + 1) // 2).view(np.int32))[:n]
    values = words.to(torch.float32).mul_(deviation * 3**0.5 / 2**31)
    return (values.add_(mean) if mean else values).view(shape)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The fp32 values of a tensor by name and logical shape."""
    ending = next((e for e in _SPREAD if name.endswith(e)), None)
    if ending:
        return _uniform(name, shape, seed, *_SPREAD[ending])
    if len(shape) == 1:
        return _uniform(name, shape, seed, 1.0, 0.1)
    return _uniform(name, shape, seed, 0.0, 1.0 if name == "embed.weight" else shape[-1] ** -0.5)


def _draw_table(name: str, shape: tuple[int, ...], seed: int, experts: int) -> Tensor:
    """int64 [V, K]: K different experts for every token id (Floyd's sampling, all ids at once)."""
    tokens, k = shape
    words = torch.from_numpy((_generator(name, seed).random_raw(tokens * k) >> 33).astype(np.int64)).view(tokens, k)
    table = torch.full(shape, -1, dtype=torch.int64)
    for column, last in enumerate(range(experts - k, experts)):
        pick = words[:, column] % (last + 1)
        taken = (table == pick[:, None]).any(1)
        table[:, column] = torch.where(taken, last, pick)
    return table


def _logical(spec: TensorSpec) -> tuple[int, ...]:
    return (spec.shape[0], 2 * spec.shape[1]) if spec.dtype == "I8" else spec.shape


def _stored(spec: TensorSpec, seed: int) -> tuple[Tensor, Tensor] | Tensor:
    """A floating tensor as the hub stores it: the tensor, or weight and scale."""
    values = _draw(spec.name, _logical(spec), seed)
    if spec.dtype == "F32":
        return values
    values = values.bfloat16()
    if spec.dtype == "BF16":
        return values
    return quantise_fp8(values) if spec.dtype == "F8_E4M3" else quantise_fp4(values)


def _dequantised(spec: TensorSpec, seed: int) -> Tensor:
    stored = _stored(spec, seed)
    if isinstance(stored, Tensor):
        return stored.float()
    out = torch.empty(_logical(spec))
    (unpack_fp8 if spec.dtype == "F8_E4M3" else unpack_fp4)(*stored, out)
    return out


def random_tensors(
    config: Config, seed: int, *, storage: str = "hub", values_from: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a random model in file order; arguments and errors as `make`."""
    if values_from not in (None, "hub"):
        raise ValueError(f"values_from={values_from!r}: expected 'hub' or None")
    hub = {s.name: s for s in checkpoint_tensors(config, "hub")}

    def drawn(spec: TensorSpec) -> list[tuple[str, Tensor]]:
        if spec.dtype == "I64":
            return [(spec.name, _draw_table(spec.name, spec.shape, seed, config.n_routed_experts))]
        if storage != "hub":
            values = _dequantised(hub[spec.name], seed) if values_from == "hub" else _draw(spec.name, spec.shape, seed)
            return [(spec.name, values.to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32))]
        stored = _stored(spec, seed)
        if isinstance(stored, Tensor):
            return [(spec.name, stored)]
        weight, scale = stored
        return [
            (spec.name, weight.view(torch.int8) if spec.dtype == "I8" else weight),
            (spec.name[: -len("weight")] + "scale", scale),
        ]

    specs = [s for s in checkpoint_tensors(config, storage) if s.dtype != "F8_E8M0"]
    with workers() as pool:
        for tensors in in_order(pool, drawn, specs):
            yield from tensors


def make(
    config: Config,
    out_dir: str | Path,
    seed: int,
    *,
    storage: str = "hub",
    values_from: str | None = None,
    shard_bytes: int | None = None,
    tokenizer: str | Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> SaveReport:
    """Write a random model as a checkpoint directory. The same config, seed and storage give the same bytes.

    storage: "hub" (FP8 and FP4 weights made by quantising random bf16 weights), "f32" or "bf16" (plain; config.json then states
    no quantisation). values_from="hub": a plain model with exactly the dequantised values of the "hub" model of the same seed
    (all representable in bf16); default: values drawn in the plain type. shard_bytes: as in `save`. tokenizer: a tokenizer.json
    to copy in. extra_files: relative name -> content. Raises ValueError for unknown storage or values_from, and as `save` does.
    """
    if config.expert_dtype == "int8":
        raise ValueError("INT8 checkpoints are made from others: v4 checkpoint convert")
    plain = {"hub": config, "f32": _plain(config, "fp32", "float32"), "bf16": _plain(config, "bf16", "bfloat16")}
    size = sum(s.bytes for s in checkpoint_tensors(config, storage))
    files = dict(extra_files or {})
    if tokenizer is not None:
        files["tokenizer.json"] = Path(tokenizer).read_bytes()
    return save(
        random_tensors(config, seed, storage=storage, values_from=values_from),
        plain[storage],
        out_dir,
        shard_bytes=shard_bytes,
        extra_files=files,
        overwrite=overwrite,
        progress=progress,
        total_bytes=size,
    )


def _plain(config: Config, experts: str, dtype: str) -> Config:
    return replace(config, weight_block_size=None, expert_dtype=experts, torch_dtype=dtype)
