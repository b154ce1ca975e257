"""Reported mistakes in reading a checkpoint, planted one by one: patterns that match too much, types that are guessed, layer kinds exchanged.

Source: specification section 13; tests/pitfalls.yaml says which test stands for which report. Right means that the parameters hold what the
checkpoint stores; a fault must be refused, by a message that names what is wrong, or give other values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import v4
import v4.packing
import v4.placement
from tests import tiny
from tests.checkpoints import CONFIG, sound
from tools.runconfig import named_config
from v4.checkpoint import Checkpoint
from v4.make import make
from v4.tensors import checkpoint_tensors

Source = tuple[str, int | None, tuple[int, int] | None]


def load(path: Path) -> dict[str, Tensor]:
    model = v4.load(path, backend="cpu", dtype=torch.float32).runner.model
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    return load(sound())


def outcome(path: Path, right: dict[str, Tensor]) -> str:
    """ "right", "wrong values", or the message of the refusal."""
    try:
        found = load(path)
    except ValueError as error:
        return str(error)
    same = found.keys() == right.keys() and all(torch.equal(found[n], right[n]) for n in right)
    return "right" if same else "wrong values"


def renamed(change: Callable[[str], str]) -> Callable[[pytest.MonkeyPatch], None]:
    """A name map that asks for other stored names."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sources = v4.placement._sources

        def wrong(name: str, shape: tuple[int, ...]) -> Iterator[Source]:
            for source, expert, rows in sources(name, shape):
                yield change(source), expert, rows

        patch.setattr(v4.placement, "_sources", wrong)

    return plant


def scales_unused(patch: pytest.MonkeyPatch) -> None:
    """Codes are taken for values: the companions are not found, and count as one."""
    unpack = v4.packing.unpack_fp8
    for module in (v4.packing, __import__("v4.load", fromlist=["x"])):
        patch.setattr(module, "unpack_fp8", lambda codes, scale, out: unpack(codes, torch.ones_like(scale.float()).to(scale.dtype), out))


NAMES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "hc_scale_taken_for_a_companion": (renamed(lambda n: n.replace("_scale", "_weight_scale_inv")), "parameters without a stored tensor"),
    "norm_of_the_model_for_all_norms": (
        renamed(lambda n: "norm.weight" if n.endswith("compressor.norm.weight") else n), "norm.weight"),
    "w1_and_w3_exchanged": (
        renamed(lambda n: n.replace(".w1.", ".wx.").replace(".w3.", ".w1.").replace(".wx.", ".w3.") if ".experts." in n else n), "wrong values"),
    "companions_not_applied": (scales_unused, "wrong values"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_that_matches_too_much_is_seen(name: str, right: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(sound(), right) == "right"
    plant, expected = NAMES[name]
    plant(monkeypatch)
    assert expected in outcome(sound(), right)


def edited(source: Path, out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The checkpoint with another config.json."""
    shutil.copytree(source, out)
    file = out / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    return out


def test_experts_without_a_stated_type_are_fp4(right: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = edited(sound(), tmp_path / "c", lambda c: {k: v for k, v in c.items() if k != "expert_dtype"})
    assert outcome(silent, right) == "right"
    read = Checkpoint._read_config
    monkeypatch.setattr(Checkpoint, "_read_config", lambda self: replace(read(self), expert_dtype="fp8"))
    assert outcome(silent, right) not in ("right", "wrong values"), "experts taken for FP8 are refused"


def test_scale_bytes_of_fp8_experts_are_exponents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, expert_dtype="fp8")
    make(config, tmp_path / "fp8", 0)
    fp8 = load(tmp_path / "fp8")
    assert outcome(tmp_path / "fp8", fp8) == "right"
    stored = Checkpoint(tmp_path / "fp8")
    weight, scale = (stored.get(f"layers.1.ffn.experts.2.w2.{part}") for part in ("weight", "scale"))
    exponent = torch.exp2(scale.view(torch.uint8).float() - 127)
    assert torch.equal(fp8["layers.1.ffn.experts.w2"][2], weight.float() * exponent.repeat_interleave(128, 0)[: len(weight)]
                       .repeat_interleave(128, 1)[:, : weight.shape[1]])  # fmt: skip
    monkeypatch.setattr(v4.packing, "e8m0_values", lambda s: s.view(torch.uint8).float())
    assert outcome(tmp_path / "fp8", fp8) == "wrong values"


def test_layer_kinds_come_from_the_checkpoint(tmp_path: Path) -> None:
    """A default pattern, with CSA and HCA exchanged as in transformers' default, does not fit the stored tensors; without one nothing is guessed."""
    source = tiny.checkpoint("flash")
    right = load(source)
    assert outcome(source, right) == "right"
    kinds = {4: 128, 128: 4}
    exchanged = edited(source, tmp_path / "a", lambda c: {**c, "compress_ratios": [kinds.get(m, m) for m in c["compress_ratios"]]})
    assert outcome(exchanged, right) not in ("right", "wrong values")
    absent = edited(source, tmp_path / "b", lambda c: {k: v for k, v in c.items() if k != "compress_ratios"})
    assert "compress_ratios" in outcome(absent, right)


def test_expert_numbers_of_hash_layers_stay_integers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Above 256 bf16 does not hold every number: a table loaded through it names other experts."""
    config = replace(CONFIG, n_routed_experts=384, moe_intermediate_size=32)
    make(config, tmp_path / "many", 0)
    stored = Checkpoint(tmp_path / "many").get("layers.0.ffn.gate.tid2eid")
    assert int(stored.max()) > 256

    many = load(tmp_path / "many")
    assert torch.equal(many["layers.0.ffn.gate.tid2eid"], stored)
    copied = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: copied(self, name).bfloat16() if name.endswith("tid2eid") else copied(self, name))
    monkeypatch.setattr(v4.placement, "TORCH_TYPES", {**v4.placement.TORCH_TYPES, "I64": torch.int32})
    assert outcome(tmp_path / "many", many) != "right"


@pytest.mark.parametrize(("name", "tensors", "transcript"), [("flash", 69187, 48), ("pro", 145116, 64)])
def test_layer_counts_of_a_transcript_do_not_fit_the_published_index(name: str, tensors: int, transcript: int) -> None:
    """An unofficial paper has 48 and 64 layers; the published indices hold as many tensors as 43 and 61 have."""
    config = named_config(name)
    assert len(list(checkpoint_tensors(config, "hub"))) == tensors
    more = (4,) * (transcript - config.num_hidden_layers)
    wrong = replace(config, num_hidden_layers=transcript, compress_ratios=(*config.compress_ratios[:-1], *more, 0))
    assert len(list(checkpoint_tensors(wrong, "hub"))) != tensors
