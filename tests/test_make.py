"""Random checkpoints: exactly the hub's files and tensors, the same bytes for the same seed, values worth computing with."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops.quant import dequant_fp8_block, dequant_mxfp4, quant_mxfp4
from tests.checkpoints import CONFIG, EXPERT, EXTRA, SHARD, expected_dense, same, sound, stored
from v4.checkpoint import Checkpoint
from v4.config import Config
from v4.make import make, random_tensors
from v4.manifest import MANIFEST
from v4.packing import quantise_fp4, quantise_fp8, unpack_fp4, unpack_fp8
from v4.save import save
from v4.shards import INDEX
from v4.tensors import checkpoint_tensors
from v4.verify import verify


@pytest.mark.parametrize("storage", ["hub", "f32", "bf16"])
def test_made_checkpoints_have_the_table_s_tensors_and_are_sound(tmp_path: Path, storage: str) -> None:
    report = make(CONFIG, tmp_path / "c", 1, storage=storage)
    checkpoint, specs = Checkpoint(tmp_path / "c"), checkpoint_tensors(CONFIG, storage)
    assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors.values()} == {s.name: (s.dtype, s.shape) for s in specs}
    assert checkpoint.storage == storage
    assert checkpoint.has_mtp
    assert report.bytes == checkpoint.bytes == checkpoint.total_size == sum(s.bytes for s in specs)
    found = verify(tmp_path / "c")
    assert found.ok, found.findings
    assert found.manifest
    assert json.loads(json.dumps(found.to_dict()))["tensors"] == len(specs)


def test_files_of_the_hub_layout() -> None:
    names = {str(p.relative_to(sound())) for p in sound().rglob("*") if p.is_file()}
    shards = {f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)}
    assert names == {*shards, INDEX, "config.json", "generation_config.json", MANIFEST, "encoding/encoding.py"}
    weight_map = json.loads((sound() / INDEX).read_text())["weight_map"]
    assert weight_map["embed.weight"] == "model-00001-of-00006.safetensors"
    assert weight_map[f"{EXPERT}.weight"] == SHARD
    assert (
        weight_map["norm.weight"] == weight_map["head.weight"] == weight_map["hc_head_fn"] == "model-00005-of-00006.safetensors"
    )
    assert weight_map["mtp.0.norm.weight"] == "model-00006-of-00006.safetensors"
    assert Config.from_file(sound()) == CONFIG
    assert len({p.stat().st_mode & 0o777 for p in sound().glob("*.*")}) == 1


def test_same_seed_same_bytes_and_sharding_does_not_matter(tmp_path: Path) -> None:
    make(CONFIG, tmp_path / "again", 0, extra_files=EXTRA)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (sound() / MANIFEST).read_bytes()
    make(CONFIG, tmp_path / "small", 0, shard_bytes=40_000)
    assert len(Checkpoint(tmp_path / "small").files) > 6
    small, whole = stored(tmp_path / "small"), stored(sound())
    assert all(same(small[n], whole[n]) for n in whole)
    make(CONFIG, tmp_path / "other", 1)
    other = stored(tmp_path / "other")
    assert not any(same(other[n], whole[n]) for n in whole if not n.endswith(".scale"))


def test_the_draws_are_those_of_every_machine() -> None:
    crc = json.loads((sound() / MANIFEST).read_text())["crc32"]
    drawn = {"embed.weight": "6ab61954", f"{EXPERT}.weight": "fbc89691", "layers.0.ffn.gate.tid2eid": "3b1ce943"}
    assert {n: crc[n] for n in drawn} == drawn


def test_random_values_are_not_degenerate() -> None:
    dense = expected_dense(sound())
    for name, t in dense.items():
        if t.dtype is not torch.float32 or t.numel() < 3:
            continue
        assert torch.isfinite(t).all(), name
        assert t.std() > 0, name
        if t.dim() == 2 and name.endswith(".weight") and name != "embed.weight":
            assert 0.8 < t.std() * t.shape[1] ** 0.5 < 1.2, name
    table = dense["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in table.tolist())
    assert set(table.flatten().tolist()) == set(range(CONFIG.n_routed_experts))
    assert dense["layers.0.attn.attn_sink"].abs().min() > 0


def test_plain_values_from_hub_are_the_dequantised_ones(tmp_path: Path) -> None:
    golden = expected_dense(sound())
    for storage in ("f32", "bf16"):
        make(CONFIG, tmp_path / storage, 0, storage=storage, values_from="hub")
        for name, t in stored(tmp_path / storage).items():
            assert same(t.float() if t.is_floating_point() else t, golden[name]), name
    make(CONFIG, tmp_path / "drawn", 0, storage="f32")
    assert not same(stored(tmp_path / "drawn")[f"{EXPERT}.weight"], golden[f"{EXPERT}.weight"])


def test_save_refuses_repeated_names_empty_streams_and_occupied_directories(tmp_path: Path) -> None:
    t = torch.zeros(2)
    with pytest.raises(ValueError, match=r"norm\.weight: found the name twice"):
        save([("norm.weight", t), ("layers.0.x", t), ("norm.weight", t)], CONFIG, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="found no tensors"):
        save([], CONFIG, tmp_path / "b")
    with pytest.raises(ValueError, match="expected a directory without a checkpoint"):
        make(CONFIG, sound(), 0)
    with pytest.raises(ValueError, match="expected a relative name"):
        save([("norm.weight", t)], CONFIG, tmp_path / "c", extra_files={"../x": b""})
    make(CONFIG, tmp_path / "d", 0)
    assert len(make(CONFIG, tmp_path / "d", 5, shard_bytes=100_000, overwrite=True).files) == len(
        list((tmp_path / "d").glob("*.safetensors"))
    )
    assert verify(tmp_path / "d").ok
    with pytest.raises(ValueError, match="values_from='f32': expected 'hub' or None"):
        next(random_tensors(CONFIG, 0, values_from="f32"))


def test_one_shard_at_a_time_is_held(tmp_path: Path) -> None:
    alive: list[int] = []
    count = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal count
        for i in range(12):
            t = torch.zeros(1000)
            count += 1
            weakref.finalize(t, lambda: alive.append(1))
            yield f"layers.0.t{i}", t
            del t
            assert count - len(alive) <= 4

    save(stream(), CONFIG, tmp_path / "c", shard_bytes=8000)


# ---- encodings -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_encodings_equal_the_contracts_bitwise(dtype: torch.dtype) -> None:
    w = torch.randn(261, 1120, generator=torch.Generator().manual_seed(0)) * 0.05
    w[0, :32], w[1, 0], w[2] = 0, -0.0, torch.arange(1120) % 49 / 8
    codes, scale = quantise_fp4(w)
    golden, golden_scale = quant_mxfp4.reference(w)
    assert same(codes, golden)
    assert same(scale, golden_scale)
    out = torch.empty(w.shape, dtype=dtype)
    unpack_fp4(codes, scale, out)
    assert same(out, dequant_mxfp4.reference(codes, scale, dtype=dtype).to(dtype))
    for part in (w, w[:256, :1024]):
        q, s = quantise_fp8(part)
        out = torch.empty(part.shape, dtype=dtype)
        unpack_fp8(q, s, out)
        assert same(out, dequant_fp8_block.reference(q, s, dtype=dtype).to(dtype))
        # the scale leaves at least half of the code range unused by no block: the rounding is that of e4m3
        assert (out.float() - part).abs().max() <= part.abs().max() * 2**-4


def test_fp8_block_scales_follow_the_rule() -> None:
    for amax, exponent in ((0.7, -9), (1.0, -8), (448.0, 0), (449.0, 1)):
        w = torch.zeros(128, 256)
        w[5, 7] = -amax
        _, scale = quantise_fp8(w)
        assert scale.view(torch.uint8).tolist() == [[127 + exponent, 127 - 22]]
