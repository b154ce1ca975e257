"""Checkpoints: what is written can be read back exactly, every parameter is filled once, and twelve kinds of damage are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ops.quant import dequant_fp8_block, dequant_mxfp4, quant_mxfp4
from tests import tiny
from v4.checkpoint import TORCH_TYPES, Checkpoint
from v4.config import Config
from v4.errors import CheckpointError
from v4.load import load_parameters
from v4.make import make, random_tensors
from v4.manifest import MANIFEST
from v4.packing import quantise_fp4, quantise_fp8, unpack_fp4, unpack_fp8
from v4.save import save
from v4.shards import INDEX
from v4.tensors import checkpoint_tensors
from v4.verify import verify

CONFIG = Config.from_dict(tiny.config([0, 4, 128], n_routed_experts=4, vocab_size=128))
WIDE = Config.from_file(Path(__file__).parents[1] / "configs" / "tiny.json")
EXPERT = "layers.1.ffn.experts.2.w1"
SHARD = "model-00003-of-00006.safetensors"  # layers.1: the embedding is the first shard


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in hub format; not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "hub"
    make(CONFIG, path, 0, extra_files={"encoding/encoding.py": b"TEXT = 'own'\n"})
    return path


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hub format with widths that are multiples of 128, so that everything can stay packed."""
    path = tmp_path_factory.mktemp("wide") / "hub"
    make(WIDE, path, 3)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None], shard: str = SHARD) -> None:
    """Change the tensors of a shard and write it again, well formed."""
    tensors = {k: v.clone() for k, v in load_file(path / shard).items()}
    change(tensors)
    save_file(tensors, path / shard)


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(path: Path, kind: str, *, file: str | None, tensor: str | None, found: str, expected: str) -> CheckpointError:
    """The damage is refused when the checkpoint is opened, and listed by verify, in the same words."""
    with pytest.raises(CheckpointError) as info:
        Checkpoint(path)
    listed = [f for f in verify(path).findings if f.kind == kind]
    for error in (info.value, listed[0]):
        assert (error.kind, error.file, error.tensor) == (kind, file, tensor), error
        assert found in error.found
        assert expected in error.expected
    for part in (file, tensor, found, expected):
        assert part is None or part in str(info.value)
    return info.value


def refused_at_load(path: Path, kind: str, *, tensor: str, found: str, expected: str, file: str = SHARD) -> None:
    """The damage lies in values: headers are sound, loading refuses, verify lists it."""
    listed = [f for f in verify(path).findings if f.kind == kind]
    with pytest.raises(CheckpointError) as info:
        load_parameters(module(parameters_of(CONFIG, torch.float32)), Checkpoint(path), dtype=torch.float32)
    for error in (info.value, listed[0]):
        assert (error.kind, error.file, error.tensor) == (kind, file, tensor), error
        assert found in error.found
        assert expected in error.expected


# ---- a model as the loader sees it: named parameters on the meta device -----------------------------------------------------------------


def module(parameters: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> nn.Module:
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


def parameters_of(config: Config, dtype: torch.dtype, *, packed: bool = False, mtp: bool = True) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of the model's parameters, dense in `dtype` or packed as stored."""
    e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for spec in checkpoint_tensors(config, "hub" if packed else "f32"):
        name, kind = spec.name, TORCH_TYPES[spec.dtype]
        block = name.partition("ffn.")[0] + "ffn."
        if name.startswith("mtp.") and not mtp:
            continue
        if ".experts." in name:
            if packed:
                found[block + "experts.w13"], found[block + "experts.w2"] = ((e, 2 * i, d // 2), torch.uint8), ((e, d, i // 2), torch.uint8)
                found[block + "experts.s13"] = ((e, 2 * i, d // 32), torch.float8_e8m0fnu)
                found[block + "experts.s2"] = ((e, d, i // 32), torch.float8_e8m0fnu)
            else:
                found[block + "experts.w13"], found[block + "experts.w2"] = ((e, 2 * i, d), dtype), ((e, d, i), dtype)
        elif ".shared_experts.w3." in name:
            continue
        elif ".shared_experts.w1." in name:
            rows, columns = spec.shape
            found[name.replace("w1", "w13")] = ((2 * rows, columns), kind if packed else dtype)
        elif ".attn.wo_a." in name:
            if name.endswith("weight"):
                found[name[: -len(".weight")]] = ((config.o_groups, config.o_lora_rank, spec.shape[1]), dtype)
        else:
            always = spec.dtype == "I64" or (kind is torch.float32 and (packed or {s.name: s for s in checkpoint_tensors(config)}[name].dtype == "F32"))
            found[name] = (spec.shape, kind if always or kind.itemsize == 1 else dtype)
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
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


# ---- writing ---------------------------------------------------------------------------------------------------------------------------


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


def test_files_of_the_hub_layout(sound: Path) -> None:
    names = {str(p.relative_to(sound)) for p in sound.rglob("*") if p.is_file()}
    shards = {f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)}
    assert names == {*shards, INDEX, "config.json", "generation_config.json", MANIFEST, "encoding/encoding.py"}
    weight_map = json.loads((sound / INDEX).read_text())["weight_map"]
    assert weight_map["embed.weight"] == "model-00001-of-00006.safetensors"
    assert weight_map[f"{EXPERT}.weight"] == SHARD
    assert weight_map["norm.weight"] == weight_map["head.weight"] == weight_map["hc_head_fn"] == "model-00005-of-00006.safetensors"
    assert weight_map["mtp.0.norm.weight"] == "model-00006-of-00006.safetensors"
    assert Config.from_file(sound) == CONFIG
    assert len({p.stat().st_mode & 0o777 for p in sound.glob("*.*")}) == 1


def test_same_seed_same_bytes_and_sharding_does_not_matter(sound: Path, tmp_path: Path) -> None:
    make(CONFIG, tmp_path / "again", 0, extra_files={"encoding/encoding.py": b"TEXT = 'own'\n"})
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (sound / MANIFEST).read_bytes()
    make(CONFIG, tmp_path / "small", 0, shard_bytes=40_000)
    assert len(Checkpoint(tmp_path / "small").files) > 6
    small, whole = stored(tmp_path / "small"), stored(sound)
    assert all(same(small[n], whole[n]) for n in whole)
    make(CONFIG, tmp_path / "other", 1)
    other = stored(tmp_path / "other")
    assert not any(same(other[n], whole[n]) for n in whole if not n.endswith(".scale"))


def test_the_draws_are_those_of_every_machine(sound: Path) -> None:
    crc = json.loads((sound / MANIFEST).read_text())["crc32"]
    assert {n: crc[n] for n in ("embed.weight", f"{EXPERT}.weight", "layers.0.ffn.gate.tid2eid")} == DRAWN


DRAWN = {"embed.weight": "", f"{EXPERT}.weight": "", "layers.0.ffn.gate.tid2eid": ""}


def test_random_values_are_not_degenerate(sound: Path) -> None:
    dense = expected_dense(sound)
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


def test_plain_values_from_hub_are_the_dequantised_ones(sound: Path, tmp_path: Path) -> None:
    golden = expected_dense(sound)
    for storage in ("f32", "bf16"):
        make(CONFIG, tmp_path / storage, 0, storage=storage, values_from="hub")
        for name, t in stored(tmp_path / storage).items():
            assert same(t.float() if t.is_floating_point() else t, golden[name]), name
    make(CONFIG, tmp_path / "drawn", 0, storage="f32")
    assert not same(stored(tmp_path / "drawn")[f"{EXPERT}.weight"], golden[f"{EXPERT}.weight"])


def test_save_refuses_repeated_names_empty_streams_and_occupied_directories(sound: Path, tmp_path: Path) -> None:
    t = torch.zeros(2)
    with pytest.raises(ValueError, match=r"norm\.weight: found the name twice"):
        save([("norm.weight", t), ("layers.0.x", t), ("norm.weight", t)], CONFIG, tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="found no tensors"):
        save([], CONFIG, tmp_path / "b")
    with pytest.raises(ValueError, match="expected a directory without a checkpoint"):
        make(CONFIG, sound, 0)
    with pytest.raises(ValueError, match="expected a relative name"):
        save([("norm.weight", t)], CONFIG, tmp_path / "c", extra_files={"../x": b""})
    make(CONFIG, tmp_path / "d", 0)
    assert len(make(CONFIG, tmp_path / "d", 5, shard_bytes=100_000, overwrite=True).files) == len(list((tmp_path / "d").glob("*.safetensors")))
    assert verify(tmp_path / "d").ok
    with pytest.raises(ValueError, match="values_from='f32': expected 'hub' or None"):
        next(random_tensors(CONFIG, 0, values_from="f32"))


def test_one_shard_at_a_time_is_held(tmp_path: Path) -> None:
    alive: list[int] = []
    import weakref

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


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def test_reader_gives_tensors_and_slices_as_stored(sound: Path) -> None:
    checkpoint, golden = Checkpoint(sound), stored(sound)
    assert checkpoint.dtype_of(f"{EXPERT}.weight") == "I8"
    assert checkpoint.shape_of("layers.0.attn.wq_a.scale") == (1, 1)
    for name in ("embed.weight", f"{EXPERT}.weight", f"{EXPERT}.scale", "layers.0.attn.wq_b.weight"):
        assert same(checkpoint.get(name), golden[name])
        assert same(checkpoint.get_slice(name, (slice(1, 3),)), golden[name][1:3])
        assert same(checkpoint.get_slice(name, (slice(0, 2), slice(1, 2))), golden[name][0:2, 1:2])
    with pytest.raises(CheckpointError, match=r"missing tensor: no\.such: found no such tensor"):
        checkpoint.get("no.such")
    with pytest.raises(ValueError, match="2 slices for 1 dimensions"):
        checkpoint.get_slice("norm.weight", (slice(0, 1), slice(0, 1)))


def test_single_file_without_index(sound: Path, tmp_path: Path) -> None:
    save_file({k: v.clone() for k, v in stored(sound).items()}, tmp_path / "model.safetensors")
    shutil.copy(sound / "config.json", tmp_path)
    assert len(Checkpoint(tmp_path).tensors) == len(checkpoint_tensors(CONFIG))
    found = verify(tmp_path)
    assert found.ok
    assert not found.manifest


def test_expert_type_is_read_from_the_weights_when_the_config_does_not_state_it(tmp_path: Path) -> None:
    make(replace(CONFIG, expert_dtype="fp8"), tmp_path / "c", 0)
    rewrite_json(tmp_path / "c" / "config.json", lambda c: c.pop("expert_dtype"))
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.config.expert_dtype == "fp8"
    assert checkpoint.dtype_of(f"{EXPERT}.weight") == "F8_E4M3"
    assert verify(tmp_path / "c").findings[0].file == "config.json"


def test_weights_without_scale_may_be_plain(damaged: Path) -> None:
    def plain(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.attn.wo_a.weight"] = tensors["layers.1.attn.wo_a.weight"].to(torch.bfloat16)
        del tensors["layers.1.attn.wo_a.scale"]

    rewrite(damaged, plain)
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].pop("layers.1.attn.wo_a.scale"))
    assert Checkpoint(damaged).dtype_of("layers.1.attn.wo_a.weight") == "BF16"


def test_checkpoint_without_mtp_is_complete(damaged: Path) -> None:
    (damaged / "model-00006-of-00006.safetensors").unlink()
    rewrite_json(damaged / INDEX, lambda i: i.update(weight_map={n: f for n, f in i["weight_map"].items() if not n.startswith("mtp.")}))
    checkpoint = Checkpoint(damaged)
    assert not checkpoint.has_mtp
    load_parameters(module(parameters_of(CONFIG, torch.float32, mtp=False)), checkpoint, dtype=torch.float32)


def test_mtp_of_another_drafter_is_ignored_and_listed(damaged: Path) -> None:
    def drafter(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors["mtp.0.main_proj.weight"] = torch.zeros(2, 2)

    rewrite(damaged, drafter, "model-00006-of-00006.safetensors")

    def index(i: dict[str, Any]) -> None:
        i["weight_map"] = {n: f for n, f in i["weight_map"].items() if not n.startswith("mtp.")}
        i["weight_map"]["mtp.0.main_proj.weight"] = "model-00006-of-00006.safetensors"

    rewrite_json(damaged / INDEX, index)
    with pytest.raises(CheckpointError, match=r"missing tensor: .*mtp\.0\.e_proj\.weight"):
        Checkpoint(damaged)
    rewrite_json(damaged / "config.json", lambda c: c.update(dspark_block_size=5, compress_ratios=[*c["compress_ratios"], 0, 0]))
    checkpoint = Checkpoint(damaged)
    assert checkpoint.ignored == ("mtp.0.main_proj.weight",)
    assert not checkpoint.has_mtp
    report = load_parameters(module(parameters_of(CONFIG, torch.float32, mtp=False)), checkpoint, dtype=torch.float32)
    assert report.ignored == checkpoint.ignored


# ---- twelve damages --------------------------------------------------------------------------------------------------------------------


def test_damage_truncated(damaged: Path) -> None:
    size = (damaged / SHARD).stat().st_size
    with (damaged / SHARD).open("r+b") as f:
        f.truncate(size - 1)
    last = max(Checkpoint(damaged, refuse=False).tensors.values(), key=lambda t: t.end).file != SHARD
    assert last
    error = refused(damaged, "truncated", file=SHARD, tensor=None, found=f"{size - 1} bytes", expected=f"{size} bytes") if False else None
    del error
    with safe_open(damaged.parent.parent / "x", framework="pt") if False else open(damaged / "config.json"):
        pass
    with pytest.raises(CheckpointError) as info:
        Checkpoint(damaged)
    assert info.value.tensor
