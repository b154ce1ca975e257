"""Reading checkpoints: tensors and slices as stored, and the forms in which a complete checkpoint may come."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import CONFIG, EXPERT, module, parameters_of, refused, rewrite, rewrite_json, same, sound, stored
from v4.checkpoint import Checkpoint
from v4.errors import CheckpointError
from v4.load import load_parameters
from v4.make import make
from v4.shards import INDEX
from v4.tensors import checkpoint_tensors
from v4.verify import verify

MTP = "model-00006-of-00006.safetensors"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of a sound checkpoint in hub format, to be damaged."""
    return Path(shutil.copytree(sound(), tmp_path / "damaged"))


def test_reader_gives_tensors_and_slices_as_stored() -> None:
    checkpoint, golden = Checkpoint(sound()), stored(sound())
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


def test_single_file_without_index(tmp_path: Path) -> None:
    save_file({k: v.clone() for k, v in stored(sound()).items()}, tmp_path / "model.safetensors")
    shutil.copy(sound() / "config.json", tmp_path)
    assert len(Checkpoint(tmp_path).tensors) == len(checkpoint_tensors(CONFIG))
    report = verify(tmp_path)
    assert report.ok
    assert not report.manifest


def test_expert_type_comes_from_the_weights_when_the_config_does_not_state_it(tmp_path: Path) -> None:
    make(replace(CONFIG, expert_dtype="fp8"), tmp_path / "c", 0)
    rewrite_json(tmp_path / "c" / "config.json", lambda c: c.pop("expert_dtype"))
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.config.expert_dtype == "fp8"
    assert checkpoint.dtype_of(f"{EXPERT}.weight") == "F8_E4M3"


def test_weights_without_scale_may_be_plain(damaged: Path) -> None:
    def plain(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.attn.wo_a.weight"] = tensors["layers.1.attn.wo_a.weight"].to(torch.bfloat16)
        del tensors["layers.1.attn.wo_a.scale"]

    rewrite(damaged, plain)
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].pop("layers.1.attn.wo_a.scale"))
    checkpoint = Checkpoint(damaged)
    assert checkpoint.storage == "hub"
    assert checkpoint.dtype_of("layers.1.attn.wo_a.weight") == "BF16"


def test_plain_checkpoints_have_one_type(tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound(storage="f32"), tmp_path / "f32"))
    name = "layers.1.attn.wq_a.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    refused(path, "wrong dtype", tensor=name, found="BF16", expected="F32")
    half = Path(shutil.copytree(sound(storage="bf16"), tmp_path / "bf16"))
    rewrite(half, lambda tensors: tensors.update({"layers.1.attn_norm.weight": tensors["layers.1.attn_norm.weight"].float()}))
    assert Checkpoint(half).storage == "bf16"  # fp32 loses nothing


def test_checkpoint_without_mtp_is_complete(damaged: Path) -> None:
    (damaged / MTP).unlink()
    rewrite_json(
        damaged / INDEX, lambda i: i.update(weight_map={n: f for n, f in i["weight_map"].items() if not n.startswith("mtp.")})
    )
    checkpoint = Checkpoint(damaged)
    assert not checkpoint.has_mtp
    load_parameters(module(parameters_of(CONFIG, torch.float32, mtp=False)), checkpoint, dtype=torch.float32)


def test_mtp_of_another_drafter_is_ignored_and_listed(damaged: Path) -> None:
    save_file({"mtp.0.main_proj.weight": torch.zeros(2, 2)}, damaged / MTP)

    def index(i: dict[str, Any]) -> None:
        i["weight_map"] = {n: f for n, f in i["weight_map"].items() if not n.startswith("mtp.")}
        i["weight_map"]["mtp.0.main_proj.weight"] = MTP

    rewrite_json(damaged / INDEX, index)
    with pytest.raises(CheckpointError, match=r"missing tensor: .*mtp\.0\.e_proj\.weight"):
        Checkpoint(damaged)
    rewrite_json(damaged / "config.json", lambda c: c.update(dspark_block_size=5, compress_ratios=[*c["compress_ratios"], 0, 0]))
    checkpoint = Checkpoint(damaged)
    assert checkpoint.ignored == ("mtp.0.main_proj.weight",)
    assert not checkpoint.has_mtp
    report = load_parameters(module(parameters_of(CONFIG, torch.float32, mtp=False)), checkpoint, dtype=torch.float32)
    assert report.ignored == checkpoint.ignored
