"""The compiled kernels of the CPU: built or refused with a reason, right beside the contracts' judge on what judges do not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.cpu_native import build, library, paged, products, streams
from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind
from tools import doctor
from v4.api import chain_of

built = pytest.mark.skipif(not library.available(), reason=f"missing {library.NEED}")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("V4_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C.. compiler found.*apt install g"):
        build.build()
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("V4_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="ended with 1"):
        build.build()
    assert not list(tmp_path.iterdir())


def test_the_name_of_the_library_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build.library_path()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    assert build.library_path() != here


def test_not_built_means_torch_with_the_reason() -> None:
    binding = bind(chain_of("cpu"), dtype=torch.float32, probes={"cpu_native": Probe()})
    choice = next(c for c in binding.choices if c.op == "linear")
    assert choice.used == ("cpu",)
    assert "python -m backends.cpu_native" in dict(choice.notes)["cpu_native"]
    assert "python -m backends.cpu_native" in binding.explain()


@built
def test_built_means_both_in_order_and_bf16_is_refused() -> None:
    used = {c.op: c.used for c in bind(chain_of("cpu"), dtype=torch.float32).choices}
    assert used["linear"] == used["moe_mlp"] == used["sparse_attention"] == ("cpu_native", "cpu")
    assert used["hadamard"] == ("cpu",)
    narrow = next(c for c in bind(chain_of("cpu"), dtype=torch.bfloat16).choices if c.op == "linear")
    assert narrow.used == ("cpu",) and "no kernel for torch.bfloat16" in dict(narrow.notes)["cpu_native"]


@built
def test_long_calls_go_to_torch() -> None:
    w = torch.randn(8, 16)
    assert products._linear_fits(torch.randn(library.FEW, 16), w)
    assert not products._linear_fits(torch.randn(library.FEW + 1, 16), w)
    assert not products._linear_fits(torch.randn(0, 16), w)
    assert not products._linear_fits(torch.randn(1, 8), torch.randn(8, 8).t())


def test_doctor_counts_the_backend_behind() -> None:
    rows = doctor.op_rows("cpu_native", torch.float32)
    assert len(rows) == len(CONTRACTS) and all(row["used"] for row in rows)


@built
def test_ids_and_slots_outside_are_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="expected 0..1"):
        products._moe_mlp(
            torch.randn(1, 8), torch.tensor([[0, 2]]), torch.ones(1, 2), torch.randn(2, 8, 8), torch.randn(2, 8, 4), limit=7.0
        )
    cache = torch.zeros(2, 4, 3)
    with pytest.raises(IndexError, match="the cache has 8 rows"):
        streams._cache_insert(cache, torch.ones(2, 3), torch.tensor([1, 8]))
    assert not cache.any()


@built
def test_ties_go_to_the_lowest_index_and_nan_is_the_largest() -> None:
    scores, index = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, float("nan")]), torch.empty(4, dtype=torch.int32)
    library.kernel("v4_best")(scores.data_ptr(), index.data_ptr(), 7, 4)
    assert index.tolist() == [1, 2, 3, 6]


@built
@pytest.mark.parametrize("channels", [64, 80, 256])
@pytest.mark.parametrize("heads", [4, 16, 20])
def test_attention_with_odd_heads_and_channels(heads: int, channels: int) -> None:
    g = torch.Generator().manual_seed(heads * channels)
    q, window = torch.randn(2, heads, channels, generator=g), torch.randn(4, 8, channels, generator=g)
    table, sink = torch.tensor([[2, 1, 3]], dtype=torch.int32), torch.randn(heads, generator=g)
    cu, start = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([17], dtype=torch.int32)
    args = (q, window, table, sink, cu, start)
    found = paged._sparse_attention(*args, scale=channels**-0.5, window=9)
    golden = CONTRACTS["sparse_attention"].reference(*args, scale=channels**-0.5, window=9, compute=torch.float64)
    assert (found - golden).abs().max() < 2e-6


@built
def test_loading_the_kernels_keeps_denormals() -> None:
    library.kernel("v4_linear")
    assert float(torch.tensor(1e-40) * 1.0) > 0
