"""The tensor table and the plan of both released models against the specification's figures, none of which is typed into the code."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from v4.config import Config
from v4.tensors import TensorSpec, section, split
from v4.tensors import checkpoint_tensors as uncached
from v4.tensors import plan as uncached_plan

CONFIGS = Path(__file__).parents[1] / "configs"
FLASH, PRO, TINY = (Config.from_file(CONFIGS / f"{name}.json") for name in ("flash", "pro", "tiny"))


@functools.cache
def checkpoint_tensors(config: Config, storage: str = "hub") -> tuple[TensorSpec, ...]:
    return tuple(uncached(config, storage))


@functools.cache
def plan(config: Config, ranks: int = 1, storage: str = "hub") -> dict[str, Any]:
    return uncached_plan(config, ranks, storage)


def by_name(config: Config, storage: str = "hub") -> dict[str, tuple[str, tuple[int, ...]]]:
    specs = checkpoint_tensors(config, storage)
    table = {s.name: (s.dtype, s.shape) for s in specs}
    assert len(table) == len(specs)
    return table


@pytest.mark.parametrize(
    ("config", "main", "mtp", "billions"),
    [(FLASH, 67_612, 1_575, "284.33"), (PRO, 142_773, 2_343, "1572.99")],
    ids=["flash", "pro"],
)
def test_published_counts(config: Config, main: int, mtp: int, billions: str) -> None:
    sizes = plan(config)
    names = [s.name for s in checkpoint_tensors(config)]
    assert sum(n.startswith("mtp.") for n in names) == mtp
    assert sizes["tensors"] == main + mtp == len(names)
    assert f"{sizes['parameters'] / 1e9:.2f}" == billions


def test_published_bytes() -> None:
    assert plan(PRO)["bytes"] == 864_704_792_696
    assert f"{plan(FLASH)['bytes'] / 1e9:.1f}" == "159.6"
    experts = [s for s in checkpoint_tensors(PRO) if ".experts." in s.name]
    assert f"{sum(s.bytes for s in experts if not s.name.startswith('mtp.')) / 1e9:.1f}" == "822.1"
    assert f"{sum(s.bytes for s in experts if s.name.startswith('mtp.')) / 1e9:.1f}" == "13.5"


def test_active_parameters() -> None:
    for config, billions in ((FLASH, "13.27"), (PRO, "48.85")):
        share = config.num_experts_per_tok / config.n_routed_experts
        active = sum(
            s.parameters * (share if ".experts." in s.name else 1) for s in checkpoint_tensors(config) if s.name != "embed.weight"
        )
        assert f"{active / 1e9:.2f}" == billions


def test_shards_of_the_hub_layout() -> None:
    for config, shards in ((FLASH, 46), (PRO, 64)):
        order = list(dict.fromkeys(section(s.name) for s in checkpoint_tensors(config)))
        assert len(order) == shards
        assert order[0] == "embed"
        assert order[-2:] == ["head", "mtp.0"]


def test_shapes_and_types_of_pro() -> None:
    table = by_name(PRO)
    expected = {
        "embed.weight": ("BF16", (129280, 7168)),
        "hc_head_fn": ("F32", (4, 28672)),
        "layers.60.hc_ffn_fn": ("F32", (24, 28672)),
        "layers.60.hc_ffn_scale": ("F32", (3,)),
        "layers.0.attn.attn_sink": ("F32", (128,)),
        "layers.0.attn.wq_a.weight": ("F8_E4M3", (1536, 7168)),
        "layers.0.attn.wq_a.scale": ("F8_E8M0", (12, 56)),
        "layers.0.attn.wq_b.weight": ("F8_E4M3", (65536, 1536)),
        "layers.0.attn.wkv.weight": ("F8_E4M3", (512, 7168)),
        "layers.0.attn.wo_a.weight": ("F8_E4M3", (16384, 4096)),
        "layers.0.attn.wo_b.weight": ("F8_E4M3", (7168, 16384)),
        "layers.0.attn.compressor.ape": ("F32", (128, 512)),
        "layers.0.attn.compressor.wkv.weight": ("BF16", (512, 7168)),
        "layers.2.attn.compressor.ape": ("F32", (4, 1024)),
        "layers.2.attn.compressor.wgate.weight": ("BF16", (1024, 7168)),
        "layers.2.attn.compressor.norm.weight": ("BF16", (512,)),
        "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1536)),
        "layers.2.attn.indexer.weights_proj.weight": ("BF16", (64, 7168)),
        "layers.2.attn.indexer.compressor.ape": ("F32", (4, 256)),
        "layers.2.attn.indexer.compressor.norm.weight": ("BF16", (128,)),
        "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6)),
        "layers.3.ffn.gate.bias": ("F32", (384,)),
        "layers.3.ffn.experts.383.w1.weight": ("I8", (3072, 3584)),
        "layers.3.ffn.experts.383.w3.scale": ("F8_E8M0", (3072, 224)),
        "layers.3.ffn.experts.0.w2.weight": ("I8", (7168, 1536)),
        "layers.3.ffn.experts.0.w2.scale": ("F8_E8M0", (7168, 96)),
        "layers.3.ffn.shared_experts.w2.weight": ("F8_E4M3", (7168, 3072)),
        "mtp.0.e_proj.weight": ("F8_E4M3", (7168, 7168)),
        "mtp.0.hnorm.weight": ("BF16", (7168,)),
        "mtp.0.ffn.gate.bias": ("F32", (384,)),
    }
    assert {name: table[name] for name in expected} == expected
    absent = (
        "layers.2.ffn.gate.bias",
        "layers.3.ffn.gate.tid2eid",
        "layers.1.attn.indexer.wq_b.weight",
        "mtp.0.attn.compressor.ape",
    )
    assert not set(absent) & set(table)


def test_plain_storage_has_the_same_weights_without_scales() -> None:
    hub, plain, half = by_name(TINY), by_name(TINY, "f32"), by_name(TINY, "bf16")
    scales = {n for n, (dtype, _) in hub.items() if dtype == "F8_E8M0"}
    assert scales
    assert set(plain) == set(half) == set(hub) - scales
    assert {dtype for dtype, _ in plain.values()} == {"F32", "I64"}
    assert plain["layers.0.ffn.experts.0.w1.weight"][1] == (TINY.moe_intermediate_size, TINY.hidden_size)
    assert half["layers.0.hc_attn_fn"][0] == "F32"
    assert plan(TINY, storage="f32")["weights"] == plan(TINY)["weights"]


def test_fp8_and_plain_experts() -> None:
    fp8 = by_name(dataclasses.replace(FLASH, expert_dtype="fp8"))
    assert fp8["layers.0.ffn.experts.0.w1.weight"] == ("F8_E4M3", (2048, 4096))
    assert fp8["layers.0.ffn.experts.0.w1.scale"] == ("F8_E8M0", (16, 32))
    bf16 = by_name(dataclasses.replace(FLASH, expert_dtype="bf16"))
    assert bf16["layers.0.ffn.experts.0.w1.weight"] == ("BF16", (2048, 4096))
    assert "layers.0.ffn.experts.0.w1.scale" not in bf16


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_element_lies_on_one_rank_or_on_all(ranks: int) -> None:
    for spec in checkpoint_tensors(FLASH):
        parts = [p for p in (split(spec, FLASH, rank, ranks) for rank in range(ranks)) if p is not None]
        whole = tuple(slice(0, n) for n in spec.shape)
        if all(p == whole for p in parts):
            assert len(parts) == (1 if ".experts." in spec.name else ranks)
            continue
        (dim,) = {i for p in parts for i, s in enumerate(p) if s != whole[i]}
        assert [i for p in parts for i in range(p[dim].start, p[dim].stop)] == list(range(spec.shape[dim]))


def test_plan_per_rank() -> None:
    eight = plan(FLASH, ranks=8)
    one = plan(FLASH)
    assert one["per_rank"][0]["bytes"] == one["bytes"] == sum(d["bytes"] for d in one["by_dtype"].values())
    assert [r["rank"] for r in eight["per_rank"]] == list(range(8))
    replicated = sum(r["bytes"] for r in eight["per_rank"]) - one["bytes"]
    assert 0 < replicated < 0.15 * one["bytes"]
    names = {
        "layers.3.attn.wo_b.scale": (slice(0, 32), slice(16, 24)),
        "layers.3.attn.wo_a.weight": (slice(2048, 3072), slice(0, 4096)),
    }
    for spec in checkpoint_tensors(FLASH):
        if spec.name in names:
            rank = 2
            assert split(spec, FLASH, rank, 8) == names[spec.name]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"do not divide over 3 ranks"):
        plan(FLASH, ranks=3)
    with pytest.raises(ValueError, match=r"o_groups: 8 do not divide over 16"):
        plan(FLASH, ranks=16)
    with pytest.raises(ValueError, match="expected at least 1"):
        plan(FLASH, ranks=0)
    with pytest.raises(ValueError, match=r"storage='fp16': expected one of hub, f32, bf16"):
        checkpoint_tensors(FLASH, "fp16")
    with pytest.raises(ValueError, match=r"48 input channels do not divide into FP4 groups of 32"):
        checkpoint_tensors(dataclasses.replace(FLASH, moe_intermediate_size=48))
