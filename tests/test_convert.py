"""Converting a checkpoint: INT8 channels, power-of-two FP8 and FP4, what is copied, what is reported, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import v4
from tests import tiny
from tools.cli import main
from v4.checkpoint import Checkpoint
from v4.convert import REPORT, convert, report_of, target_config, values
from v4.errors import CheckpointError
from v4.load import check_values
from v4.make import make
from v4.packing import channel_scale_problem, quantise_int8, unpack_int8


@pytest.fixture(scope="module")
def hub() -> Path:
    return Path(tiny.checkpoint("flash"))


@pytest.fixture(scope="module")
def int8(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "checkpoint"
    convert(hub, out, "int8")
    return out


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_codes_and_scales(kind: torch.dtype) -> None:
    w = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    codes, scale = quantise_int8(w, kind)
    assert codes.dtype == torch.int8 and scale.dtype == kind and int(codes.abs().max()) == 127
    assert float(scale[3]) == 0 and not codes[3].any()
    back = torch.empty(w.shape)
    unpack_int8(codes, scale, back)
    # half a step, and what a scale that was rounded down clips off the largest value
    step = scale.float()[:, None]
    assert bool(((back - w).abs() <= step / 2 + (w.abs() - 127 * step).clamp(min=0) + 1e-9).all())
    assert torch.equal(back, codes.float() * step)


def test_an_int8_checkpoint_holds_what_the_hub_holds_within_a_step(hub: Path, int8: Path) -> None:
    source, found = Checkpoint(hub), Checkpoint(int8)
    assert found.config.expert_dtype == "int8" and found.config.weight_block_size is None
    assert found.dtype_of("layers.0.attn.wq_a.weight") == "I8" and found.dtype_of("layers.0.attn.wq_a.scale") == "F32"
    assert found.dtype_of("layers.0.ffn.experts.0.w1.scale") == "BF16"
    assert found.dtype_of("layers.0.attn.wo_a.weight") == "BF16"
    for name in source.tensors:
        if name.endswith(".scale") or name in found.ignored:
            continue
        a, b = values(source, name).float(), values(found, name).float()
        assert float((a - b).abs().max()) <= 0.006 * float(a.abs().max()), name


def test_the_report_says_what_moved(int8: Path) -> None:
    report = json.loads((int8 / REPORT).read_text(encoding="utf-8"))
    assert report["changed"] == len(report["tensors"]) and report["copied"] > 0
    assert report["by_type"]["F8_E4M3 -> BF16"]["worst"] == 0
    assert 0 < report["by_type"]["F8_E4M3 -> I8"]["worst"] < 0.006
    assert report_of([], 3) == {"copied": 3, "changed": 0, "by_type": {}, "tensors": []}


def test_a_hub_checkpoint_keeps_its_bits_for_mx(hub: Path, tmp_path: Path) -> None:
    done = convert(hub, tmp_path / "mx", "mx")
    assert not done.changes
    a, b = Checkpoint(hub), Checkpoint(tmp_path / "mx")
    assert set(a.tensors) - set(a.ignored) == set(b.tensors)
    for name in b.tensors:
        assert torch.equal(a.get(name).view(torch.uint8), b.get(name).view(torch.uint8)), name


def test_a_plain_checkpoint_becomes_what_the_hub_would_store(tmp_path: Path) -> None:
    config = Checkpoint(tiny.checkpoint("flash")).config
    make(config, tmp_path / "hub", 0)
    make(config, tmp_path / "plain", 0, storage="bf16", values_from="hub")
    done = convert(tmp_path / "plain", tmp_path / "mx", "mx")
    assert done.changes and max(c.worst for c in done.changes) == 0
    assert Checkpoint(tmp_path / "mx").dtype_of("layers.0.ffn.experts.0.w1.weight") == "I8"


def test_stored_numerics_multiply_codes_and_exact_ones_what_they_stand_for(hub: Path, int8: Path) -> None:
    ids = tiny.tokens(40)
    stored, exact = (v4.load(int8, numerics=n, dtype=torch.float32) for n in ("stored", "exact"))
    assert stored.runner.model.layers[0].attn.wq_a.weight.dtype == torch.int8  # type: ignore[union-attr]
    assert exact.runner.model.layers[0].attn.wq_a.weight.dtype == torch.float32  # type: ignore[union-attr]
    original = v4.load(hub, dtype=torch.float32).logits(ids)
    spread = float(original.std())
    assert float((exact.logits(ids) - original).abs().mean()) < 0.15 * spread
    assert float((stored.logits(ids) - original).abs().mean()) < 0.3 * spread
    assert torch.equal(stored.logits(ids), stored.logits(ids))


def test_reference_numerics_are_refused_for_int8(int8: Path) -> None:
    with pytest.raises(ValueError, match="this checkpoint is INT8: use numerics='stored' or 'exact'"):
        v4.load(int8, numerics="reference")


def test_what_can_not_be_converted(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found the source itself"):
        convert(hub, hub, "int8")
    with pytest.raises(ValueError, match="kind='hif8': expected one of int8, mx"):
        target_config(Checkpoint(hub).config, "hif8")
    with pytest.raises(ValueError, match="v4 checkpoint convert"):
        make(target_config(Checkpoint(hub).config, "int8"), tmp_path / "made", 0)


def test_damaged_scales_are_refused(int8: Path) -> None:
    problem = channel_scale_problem(torch.tensor([1.0, float("nan"), -2.0]), file="f", tensor="t.scale")
    assert isinstance(problem, CheckpointError) and "nan at [1], 2 such" in str(problem)
    stored = Checkpoint(int8).tensors["layers.0.attn.wq_a.scale"]
    assert check_values(stored, torch.tensor([1.0]), 4) is None
    assert check_values(stored, torch.tensor([float("inf")]), 4) is not None


def test_the_command(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a3"
    assert main(["checkpoint", "convert", str(hub), "--target", "ascend-a3-w8a8", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["numerics"] == "stored" and report["changed"] == len(report["tensors"])
    assert main(["checkpoint", "verify", str(out)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(hub), "--target", "ascend-a3-w8a9", "--out", str(out)]) == 2
    assert "did you mean 'ascend-a3-w8a8'" in capsys.readouterr().err
    assert main(["checkpoint", "convert", str(hub), "--target", "ascend-a3-w8a8", "--out", str(out)]) == 2
    assert "expected a directory without a checkpoint" in capsys.readouterr().err
