"""Loading: every parameter filled exactly once with exactly the stored values, packed or dequantised, nothing left over."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import CONFIG, EXPERT, SHARD, WIDE, Parameters, expected_dense, module, parameters_of, same, sound, stored
from v4.checkpoint import Checkpoint
from v4.errors import CheckpointError
from v4.load import LoadReport, load_parameters, raw_read_gb_per_s
from v4.make import make
from v4.memory import LARGE, Memory


def filled(
    path: Path, parameters: Parameters, dtype: torch.dtype, *, include_mtp: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    root = module(parameters)
    report = load_parameters(root, Checkpoint(path), dtype=dtype, include_mtp=include_mtp)
    found = dict(root.named_parameters())
    assert {n: (tuple(p.shape), p.dtype) for n, p in found.items()} == parameters
    assert not any(p.is_meta or p.requires_grad for p in found.values())
    return {n: p.data for n, p in found.items()}, report


def assembled(tensors: dict[str, Tensor], name: str, experts: int) -> Tensor:
    """What a parameter must hold, written down independently of the loader."""
    if ".ffn.experts." in name:
        stem, _, last = name.rpartition(".")
        kind = "weight" if last.startswith("w") else "scale"
        parts = ("w1", "w3") if last.endswith("13") else ("w2",)
        experts_ = [cat([tensors[f"{stem}.{e}.{p}.{kind}"] for p in parts]) for e in range(experts)]
        return cat(experts_).view(experts, *experts_[0].shape)
    if ".w13." in name:
        return cat([tensors[name.replace("w13", "w1")], tensors[name.replace("w13", "w3")]])
    return tensors[f"{name}.weight"] if name.endswith(".wo_a") else tensors[name]


def cat(parts: list[Tensor]) -> Tensor:
    # torch can not concatenate the 8-bit float types everywhere
    return torch.cat([p.view(torch.uint8) for p in parts]).view(parts[0].dtype) if parts[0].itemsize == 1 else torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("storage", "values_from"), [("hub", None), ("f32", "hub"), ("bf16", "hub")])
def test_dense_parameters_hold_the_dequantised_values(storage: str, values_from: str | None, dtype: torch.dtype) -> None:
    golden = expected_dense(sound())
    found, report = filled(sound(storage=storage, values_from=values_from), parameters_of(CONFIG, dtype), dtype)
    assert report.filled == len(found)
    assert report.bytes == Checkpoint(sound(storage=storage, values_from=values_from)).bytes
    assert report.gb_per_s > 0
    assert report.ignored == ()
    for name, value in found.items():
        want = assembled(golden, name, CONFIG.n_routed_experts)
        assert same(value, want.view(value.shape).to(value.dtype)), name


def test_packed_parameters_hold_the_stored_bytes() -> None:
    golden = stored(sound(WIDE))
    found, report = filled(sound(WIDE), parameters_of(WIDE, torch.bfloat16, packed=True), torch.bfloat16)
    assert report.bytes == Checkpoint(sound(WIDE)).bytes
    for name, value in found.items():
        if name.endswith("attn.wo_a"):
            want = expected_dense(sound(WIDE))[f"{name}.weight"].view(value.shape).bfloat16()
        else:
            want = assembled(golden, name, WIDE.n_routed_experts)
            want = want.view(torch.uint8) if want.dtype is torch.int8 else want
        assert same(value, want), name


def test_fp8_experts_packed_and_dense(tmp_path: Path) -> None:
    config = replace(WIDE, expert_dtype="fp8")
    make(config, tmp_path / "c", 0)
    e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    packed = parameters_of(WIDE, torch.bfloat16, packed=True)
    for name in list(packed):
        stem, _, last = name.rpartition(".")
        if stem.endswith("ffn.experts"):
            shape = {"w13": (e, 2 * i, d), "w2": (e, d, i), "s13": (e, 2 * i // 128, d // 128), "s2": (e, d // 128, i // 128)}[
                last
            ]
            packed[name] = (shape, torch.float8_e4m3fn if last[0] == "w" else torch.float8_e8m0fnu)
    golden, stem = stored(tmp_path / "c"), "layers.2.ffn.experts"
    found, _ = filled(tmp_path / "c", packed, torch.bfloat16)
    assert same(found[f"{stem}.w13"][5, i:], golden[f"{stem}.5.w3.weight"])
    assert same(found[f"{stem}.s13"][5, 1:], golden[f"{stem}.5.w3.scale"])
    dense, _ = filled(tmp_path / "c", parameters_of(config, torch.float32), torch.float32)
    assert same(dense[f"{stem}.w2"][7], expected_dense(tmp_path / "c")[f"{stem}.7.w2.weight"])


def test_mtp_can_be_left_out() -> None:
    parameters = parameters_of(CONFIG, torch.float32, mtp=False)
    found, report = filled(sound(), parameters, torch.float32, include_mtp=False)
    assert not any(n.startswith("mtp.") for n in found)
    assert set(report.ignored) == {n for n in Checkpoint(sound()).tensors if n.startswith("mtp.")}
    with pytest.raises(ValueError, match=r"stored tensors without a parameter, expected none: mtp\.0\."):
        load_parameters(module(parameters), Checkpoint(sound()), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"parameters without a stored tensor, expected none: mtp\.0\."):
        load_parameters(module(parameters_of(CONFIG, torch.float32)), Checkpoint(sound()), dtype=torch.float32, include_mtp=False)


def test_unfilled_parameters_and_unused_tensors_are_named() -> None:
    checkpoint, parameters = Checkpoint(sound()), parameters_of(CONFIG, torch.float32)
    with pytest.raises(ValueError, match=r"found 1 parameters without a stored tensor, expected none: layers\.0\.bias"):
        load_parameters(module({**parameters, "layers.0.bias": ((2,), torch.float32)}), checkpoint, dtype=torch.float32)
    fewer = {n: p for n, p in parameters.items() if n != "layers.1.attn.kv_norm.weight"}
    with pytest.raises(
        ValueError, match=r"found 1 stored tensors without a parameter, expected none: layers\.1\.attn\.kv_norm\.weight"
    ):
        load_parameters(module(fewer), checkpoint, dtype=torch.float32)
    experts = "layers.1.ffn.experts.w13"
    shape, dtype = parameters[experts]
    with pytest.raises(ValueError, match=r"parameters without a stored tensor, expected none: layers\.1\.ffn\.experts\.w13"):
        load_parameters(module({**parameters, experts: ((shape[0] + 1, *shape[1:]), dtype)}), checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"stored tensors without a parameter, expected none: layers\.1\.ffn\.experts\.3\.w1"):
        load_parameters(module({**parameters, experts: ((shape[0] - 1, *shape[1:]), dtype)}), checkpoint, dtype=torch.float32)
    doubled = {**parameters, "layers.1.ffn.shared_experts.w1.weight": ((32, 64), torch.float32)}
    with pytest.raises(
        ValueError, match=r"found 2 stored tensors used twice, expected none: layers\.1\.ffn\.shared_experts\.w1\."
    ):
        load_parameters(module(doubled), checkpoint, dtype=torch.float32)


def test_wrong_parameter_shapes_and_types_are_named() -> None:
    checkpoint, parameters = Checkpoint(sound()), parameters_of(CONFIG, torch.float32)
    with pytest.raises(CheckpointError, match=r"wrong shape: .*norm\.weight: found \[64\]; expected \[65\] for norm\.weight"):
        load_parameters(module({**parameters, "norm.weight": ((65,), torch.float32)}), checkpoint, dtype=torch.float32)
    with pytest.raises(
        ValueError,
        match=r"norm\.weight: found a parameter of torch\.bfloat16, expected torch\.float32",
    ):
        load_parameters(module({**parameters, "norm.weight": ((64,), torch.bfloat16)}), checkpoint, dtype=torch.float32)
    with pytest.raises(
        CheckpointError, match=r"wrong dtype: .*norm\.weight: found BF16; expected a tensor that becomes torch\.float8_e4m3fn"
    ):
        load_parameters(module({**parameters, "norm.weight": ((64,), torch.float8_e4m3fn)}), checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"shared_experts\.w13\.scale: found an expert width of 32, expected a multiple of 128"):
        load_parameters(module(parameters_of(CONFIG, torch.bfloat16, packed=True)), checkpoint, dtype=torch.bfloat16)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound(storage="f32"), tmp_path / "c"))
    checkpoint = Checkpoint(path)
    with (path / SHARD).open("r+b") as f:
        f.truncate(10_000)
    with pytest.raises(CheckpointError, match=rf"truncated: {SHARD}: found the end of the file at 10000; expected"):
        load_parameters(module(parameters_of(CONFIG, torch.float32)), checkpoint, dtype=torch.float32)


def test_loaded_values_do_not_follow_the_file(tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound(storage="f32"), tmp_path / "c"))
    found, _ = filled(path, parameters_of(CONFIG, torch.float32), torch.float32)
    before = {n: v.clone() for n, v in found.items()}
    size = (path / SHARD).stat().st_size
    with (path / SHARD).open("r+b") as f:
        f.seek(size // 4)
        f.write(b"\0" * (size // 2))
    assert all(same(v, before[n]) for n, v in found.items())


def test_progress_is_shown_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        root = module(parameters_of(CONFIG, torch.float32))
        load_parameters(root, Checkpoint(sound()), dtype=torch.float32, progress=progress)
        assert ("load: 100%" in capfd.readouterr().err) == progress


def test_threads_do_not_change_values_or_the_callers_thread_count() -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        root = module(parameters_of(CONFIG, torch.float32))
        load_parameters(root, Checkpoint(sound()), dtype=torch.float32, threads=threads)
        found.append({n: p.data for n, p in root.named_parameters()})
    assert all(same(v, found[1][n]) for n, v in found[0].items())
    assert torch.get_num_threads() == before


def test_device_argument_moves_parameters() -> None:
    root: nn.Module = module(parameters_of(CONFIG, torch.float32))
    load_parameters(root, Checkpoint(sound()), dtype=torch.float32, device=torch.device("cpu"))
    assert root.get_parameter(f"{EXPERT.rsplit('.', 2)[0]}.w13").device == torch.device("cpu")


def test_raw_reading_reports_a_rate() -> None:
    assert raw_read_gb_per_s(sound()) > 0


def test_long_tensors_are_read_in_parts_and_hold_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_of(CONFIG, torch.float32)
    whole, _ = filled(sound(storage="f32"), parameters, torch.float32)
    monkeypatch.setattr(sys.modules["v4.load"], "PART", 1000)  # odd, so that a part ends within a row
    monkeypatch.setattr(sys.modules["v4.memory"], "LARGE", 4096)
    parts, report = filled(sound(storage="f32"), parameters, torch.float32)
    assert report.bytes == Checkpoint(sound(storage="f32")).bytes
    assert all(same(parts[name], value) for name, value in whole.items())


def _mappings() -> int:
    maps = Path("/proc/self/maps")
    return len(maps.read_text(encoding="utf-8").splitlines()) if maps.is_file() else 0


def test_tensors_do_not_overlap_and_their_pages_are_given_back() -> None:
    before = _mappings()
    memory, shapes = Memory(), [(3, LARGE // 4 + 5), (7,), (0, 7), (LARGE // 4 - 1,), (5, 3), *[(LARGE // 8,)] * 9]
    made = [memory.uninitialised(shape, torch.float32) for shape in shapes]
    for number, tensor in enumerate(made):
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(made, shapes, strict=True)):
        assert tensor.shape == shape and bool((tensor == number).all())
    assert memory.uninitialised((3,), torch.bfloat16).dtype is torch.bfloat16
    del made, tensor, memory
    assert _mappings() <= before + 4


def _flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address; "hg": huge pages are advised."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and ":" not in head:
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return rest.split()
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a kernel without huge pages")
def test_huge_pages_are_offered_after_the_filling_and_hold_nothing() -> None:
    before, memory = _mappings(), Memory()
    kept, dropped = memory.uninitialised((LARGE,), torch.float32), memory.uninitialised((LARGE,), torch.float32)
    assert "hg" not in _flags(kept.data_ptr())
    del dropped
    assert _mappings() <= before + 3
    memory.offer()
    assert "hg" in _flags(kept.data_ptr() + LARGE)
