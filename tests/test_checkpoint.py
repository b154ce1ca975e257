"""Damaged checkpoints: whatever is wrong is refused with file, tensor, what was found and what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import (
    CONFIG,
    EXPERT,
    SHARD,
    check,
    module,
    parameters_of,
    refused,
    refused_at_load,
    rewrite,
    rewrite_json,
    sound,
    stored,
)
from v4.checkpoint import Checkpoint
from v4.config import ConfigError
from v4.errors import CheckpointError
from v4.load import load_parameters
from v4.manifest import MANIFEST
from v4.shards import INDEX
from v4.verify import verify

OTHER = "model-00004-of-00006.safetensors"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of a sound checkpoint in hub format, to be damaged."""
    return Path(shutil.copytree(sound(), tmp_path / "damaged"))


# ---- twelve damages ------------------------------------------------------------------------------------------------------


def test_damage_truncated(damaged: Path) -> None:
    size = (damaged / SHARD).stat().st_size
    last = max((t for t in Checkpoint(damaged).tensors.values() if t.file == SHARD), key=lambda t: t.end)
    for cut in (size - 1, size // 2, 100, 3):
        with (damaged / SHARD).open("r+b") as f:
            f.truncate(cut)
        if cut == size - 1:
            refused(damaged, "truncated", tensor=last.name, found=f"{cut} bytes", expected=f"{size} bytes")
        else:
            with pytest.raises(CheckpointError, match=rf"truncated: {SHARD}: .*found {cut} bytes; expected"):
                Checkpoint(damaged)


def test_damage_trailing_bytes(damaged: Path) -> None:
    size = (damaged / SHARD).stat().st_size
    last = max((t for t in Checkpoint(damaged).tensors.values() if t.file == SHARD), key=lambda t: t.end)
    with (damaged / SHARD).open("ab") as f:
        f.write(b"\0" * 8)
    refused(damaged, "trailing bytes", tensor=last.name, found=f"{size + 8} bytes, 8 after", expected=f"{size} bytes")


def test_damage_flipped_data_bit(damaged: Path) -> None:
    stored_at = Checkpoint(damaged).tensors[f"{EXPERT}.weight"]
    data = bytearray((damaged / SHARD).read_bytes())
    data[stored_at.begin + 5] ^= 16
    (damaged / SHARD).write_bytes(data)
    crc = json.loads((damaged / MANIFEST).read_text())["crc32"][f"{EXPERT}.weight"]
    report = verify(damaged)
    assert len(report.findings) == 1
    check(report.findings[0], "checksum", SHARD, f"{EXPERT}.weight", "CRC-32", f"CRC-32 {crc}")
    with pytest.raises(CheckpointError, match=f"checksum: {SHARD}: {EXPERT}.weight: found CRC-32"):
        load_parameters(module(parameters_of(CONFIG, torch.float32)), Checkpoint(damaged), dtype=torch.float32, verify=True)
    (damaged / MANIFEST).unlink()
    assert verify(damaged).ok  # nothing else can tell one random code from another,
    assert not verify(damaged).manifest  # and the report says that there were no checksums


def test_damage_missing_shard(damaged: Path) -> None:
    (damaged / SHARD).unlink()
    lost = [n for n, f in json.loads((damaged / INDEX).read_text())["weight_map"].items() if f == SHARD]
    refused(damaged, "missing shard", tensor=lost[0], found="no such file", expected=f"{len(lost) - 1} other tensors")


def test_damage_index_to_absent_file(damaged: Path) -> None:
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].update({f"{EXPERT}.weight": "weights.safetensors"}))
    refused(
        damaged,
        "index to absent file",
        file="weights.safetensors",
        tensor=f"{EXPERT}.weight",
        found="no such file",
        expected="the file",
    )


def test_damage_duplicate_key_in_two_shards(damaged: Path) -> None:
    name = f"{EXPERT}.scale"
    rewrite(damaged, lambda tensors: tensors.update({name: stored(damaged)[name]}), OTHER)
    refused(damaged, "duplicate key", file=OTHER, tensor=name, found=f"{SHARD} and {OTHER}", expected=f"only in {SHARD}")


def test_damage_duplicate_key_in_the_index(damaged: Path) -> None:
    text = (damaged / INDEX).read_text()
    (damaged / INDEX).write_text(text.replace('"norm.weight":', f'"norm.weight": "{SHARD}",\n "norm.weight":', 1))
    refused(damaged, "duplicate key", file=INDEX, tensor="norm.weight", found="the name twice", expected="every name once")


def test_damage_duplicate_key_in_a_header(damaged: Path) -> None:
    data = (damaged / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = json.dumps(json.loads(header)[f"{EXPERT}.scale"])
    header = header[:-1] + f',"{EXPERT}.scale":{entry}}}'
    (damaged / SHARD).write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])
    refused(damaged, "duplicate key", tensor=f"{EXPERT}.scale", found="the name twice", expected="every name once")


def test_damage_wrong_shape(damaged: Path) -> None:
    name = "layers.1.attn.wq_a.weight"
    rewrite(damaged, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    refused(damaged, "wrong shape", tensor=name, found="[32, 63]", expected="[32, 64]")


def test_damage_wrong_dtype(damaged: Path) -> None:
    changes = {
        "layers.1.attn.wq_a.weight": (torch.bfloat16, "BF16", "F8_E4M3"),  # with its scale still there
        "layers.1.attn_norm.weight": (torch.float32, "F32", "BF16"),
        "layers.1.hc_attn_fn": (torch.bfloat16, "BF16", "F32"),
        "layers.1.attn.wq_a.scale": (torch.float32, "F32", "F8_E8M0"),
    }
    whole = (damaged / SHARD).read_bytes()
    for name, (dtype, found, expected) in changes.items():
        rewrite(damaged, lambda tensors, n=name, d=dtype: tensors.update({n: tensors[n].to(d)}))  # type: ignore[misc]
        refused(damaged, "wrong dtype", tensor=name, found=found, expected=expected)
        (damaged / SHARD).write_bytes(whole)
    rewrite(damaged, lambda tensors: tensors.update({f"{EXPERT}.weight": tensors[f"{EXPERT}.weight"].view(torch.uint8)}))
    refused(damaged, "wrong dtype", tensor=f"{EXPERT}.weight", found="U8", expected="I8")


def set_scale(path: Path, name: str, byte: int) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        codes = tensors[name].view(torch.uint8)
        codes[-1, 0] = byte
        tensors[name] = codes.view(torch.float8_e8m0fnu)

    rewrite(path, change)


@pytest.mark.parametrize("name", [f"{EXPERT}.scale", "layers.1.attn.wo_a.scale", "layers.1.ffn.shared_experts.w2.scale"])
def test_damage_nan_scale(damaged: Path, name: str) -> None:
    set_scale(damaged, name, 255)
    refused_at_load(damaged, "NaN scale", tensor=name, found="byte 255 (NaN) at [", expected="2^-40 to 2^40")


@pytest.mark.parametrize(("byte", "found"), [(0, "2^-127 at ["), (86, "2^-41"), (168, "2^41"), (254, "2^127")])
def test_damage_absurd_scale(damaged: Path, byte: int, found: str) -> None:
    set_scale(damaged, f"{EXPERT}.scale", byte)
    refused_at_load(damaged, "absurd scale", tensor=f"{EXPERT}.scale", found=found, expected="2^-40 to 2^40")


def test_scales_at_the_limits_are_accepted(damaged: Path) -> None:
    for byte in (87, 167):
        set_scale(damaged, f"{EXPERT}.scale", byte)
        load_parameters(module(parameters_of(CONFIG, torch.float32)), Checkpoint(damaged), dtype=torch.float32)


def test_damage_missing_tensor(damaged: Path) -> None:
    name = "layers.1.attn.kv_norm.weight"
    rewrite(damaged, lambda tensors: tensors.pop(name))
    refused(damaged, "key not in its shard", tensor=name, found="no such tensor", expected=INDEX)
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].pop(name))
    refused(damaged, "missing tensor", file=INDEX, tensor=name, found="no such tensor", expected="BF16 [64]")


def test_damage_missing_scale(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.pop(f"{EXPERT}.scale"))
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].pop(f"{EXPERT}.scale"))
    refused(damaged, "missing tensor", file=INDEX, tensor=f"{EXPERT}.scale", found="no such tensor", expected="F8_E8M0 [32, 2]")


def test_damage_swapped_expert_matrices(damaged: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        stem = EXPERT[:-3]
        for part in ("weight", "scale"):
            a, b = f"{stem}.w1.{part}", f"{stem}.w2.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(damaged, swap)
    error = refused(damaged, "wrong shape", tensor=f"{EXPERT}.weight", found="[64, 16]", expected="[32, 32]")
    assert "w2 and w1 or w3 seem swapped" in error.hint


# ---- more damages --------------------------------------------------------------------------------------------------------


def test_damage_two_shards_under_each_others_names(damaged: Path) -> None:
    (damaged / SHARD).rename(damaged / "x")
    (damaged / OTHER).rename(damaged / SHARD)
    (damaged / "x").rename(damaged / OTHER)
    with pytest.raises(CheckpointError, match=r"tensor in another shard: .*Two shards may have changed names"):
        Checkpoint(damaged)


def test_damage_all_zero_expert(damaged: Path) -> None:
    # 0x80 in the high and 0x08 in the low nibble are minus zero
    rewrite(
        damaged,
        lambda tensors: tensors.update({f"{EXPERT}.weight": torch.full((32, 32), 0x88, dtype=torch.uint8).view(torch.int8)}),
    )
    finding = next(f for f in verify(damaged).findings if f.kind == "all-zero expert")
    check(finding, "all-zero expert", SHARD, f"{EXPERT}.weight", "zero in every element", "trained weights")


def test_damage_expert_out_of_range(damaged: Path) -> None:
    name, shard = "layers.0.ffn.gate.tid2eid", "model-00002-of-00006.safetensors"
    rewrite(damaged, lambda tensors: tensors[name].__setitem__((7, 1), 4), shard)
    refused_at_load(damaged, "expert out of range", file=shard, tensor=name, found="numbers from 0 to 4", expected="0 to 3")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers.1.attn_norm.weight", float("inf")),
        ("layers.1.hc_ffn_fn", float("nan")),
        ("layers.1.attn.wq_b.weight", float("nan")),
    ],
)
def test_damage_not_finite(damaged: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].float().flatten()
        flat[3] = value
        tensors[name] = flat.view(tensors[name].shape).to(tensors[name].dtype)

    rewrite(damaged, change)
    finding = next(f for f in verify(damaged).findings if f.kind == "not finite")
    check(finding, "not finite", SHARD, name, "the first at element 3", "finite values")


def test_damage_unexpected_and_unlisted_tensors(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({"layers.1.bias": torch.zeros(2)}))
    refused(damaged, "tensor not in index", tensor="layers.1.bias", found="no entry", expected=INDEX)
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].update({"layers.1.bias": SHARD}))
    refused(damaged, "unexpected tensor", tensor="layers.1.bias", found="F32 [2]", expected="no such tensor")


def test_damage_headers_and_index(damaged: Path) -> None:
    whole = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes(whole[:8] + b"[" + whole[9:])
    refused(damaged, "damaged header", tensor=None, found="no safetensors header", expected="JSON")
    (damaged / SHARD).write_bytes(b"\xff" * 8 + whole[8:])
    refused(damaged, "damaged header", tensor=None, found="a header of", expected="at most")
    (damaged / SHARD).write_bytes(whole.replace(b'"shape":[32,64]', b'"shape":[32,65]', 1))
    with pytest.raises(CheckpointError, match=r"damaged header: .*found bytes \d+ to \d+ of the data; expected"):
        Checkpoint(damaged)
    (damaged / SHARD).write_bytes(whole)
    rewrite_json(damaged / INDEX, lambda index: index["weight_map"].update({"norm.weight": "../x.safetensors"}))
    refused(
        damaged,
        "damaged index",
        file=INDEX,
        tensor="norm.weight",
        found="'../x.safetensors'",
        expected="a name in this directory",
    )
    (damaged / INDEX).write_text("{")
    refused(damaged, "damaged index", file=INDEX, tensor=None, found="no index", expected="weight_map")
    (damaged / INDEX).unlink()
    refused(damaged, "missing index", file=INDEX, tensor=None, found="6 safetensors files without an index", expected=INDEX)
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(damaged / "absent")


def test_damage_beside_the_weights(damaged: Path) -> None:
    (damaged / "encoding" / "encoding.py").write_text("TEXT = 'other'\n")
    rewrite_json(damaged / INDEX, lambda index: index["metadata"].update(total_size=1))
    (damaged / "generation_config.json").unlink()
    kinds = {(f.kind, f.file) for f in verify(damaged).findings}
    assert kinds == {
        ("checksum", "encoding/encoding.py"),
        ("wrong total_size", INDEX),
        ("missing file", "generation_config.json"),
    }
    (damaged / MANIFEST).write_text("[]")
    assert ("damaged manifest", MANIFEST) in {(f.kind, f.file) for f in verify(damaged).findings}
    rewrite_json(damaged / "config.json", lambda c: c.update(model_type="llama"))
    assert verify(damaged).findings[0].kind == "wrong config"
    with pytest.raises(ConfigError, match="llama"):
        Checkpoint(damaged)


def test_several_problems_are_counted_and_all_listed(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.update({n: t[:1].clone() for n, t in tensors.items() if n.endswith("norm.weight")}))
    with pytest.raises(CheckpointError, match=r"\(and 5 more problems; `v4 checkpoint verify` lists them all\)"):
        Checkpoint(damaged)
    assert sum(f.kind == "wrong shape" for f in verify(damaged).findings) == 6
