"""The compiled kernels of the CPU: built or refused with a reason, right beside the contracts' judge on what judges do not see."""

from __future__ import annotations

import inspect
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.cpu_native import build, library, paged, products, streams
from ops.contract import CONTRACTS
from ops.probe import Probe
from ops.registry import bind, chain_of
from tools import doctor

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


def test_without_pythons_headers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("V4_CACHE", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(build.BuildError, match="no Python.h in .*apt install python3-dev"):
        build.build()
    assert not list(tmp_path.iterdir())


def test_where_there_is_a_compiler_the_kernels_compile() -> None:
    # set-up tolerates a failure, so that an odd compiler costs speed only; here it must show
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert build.build().is_file()


def test_the_name_of_the_library_follows_the_processor_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build.library_path()
    monkeypatch.setattr(build.torch, "__version__", "0.1")
    other_torch = build.library_path()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    assert len({here, other_torch, build.library_path()}) == 3


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


@built
def test_shapes_that_do_not_agree_go_to_torch_which_refuses_them() -> None:
    ops = bind(chain_of("cpu"), dtype=torch.float32).ops
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(1, 16), torch.randn(8, 32))
    with pytest.raises((RuntimeError, IndexError)):
        ops.cache_insert(torch.zeros(2, 4, 3), torch.ones(2, 5), torch.tensor([1, 2]))


@built
def test_blocks_outside_the_cache_are_refused() -> None:
    q, cache, sink = torch.randn(1, 16, 32), torch.randn(3, 4, 32), torch.zeros(16)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    for table, start in (([[1, 7]], 6), ([[1, 2]], 9)):
        args = (torch.tensor(table, dtype=torch.int32), sink, cu, torch.tensor([start], dtype=torch.int32))
        with pytest.raises(IndexError, match="sparse_attention: the call needs rows of blocks"):
            paged._sparse_attention(q, cache, *args, scale=1.0, window=8)


def _threaded() -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, ids = r(3, 256), torch.tensor([[0, 3], [1, 0], [2, 3]])
    w13, w2, fn, streams = r(4, 192, 256), r(4, 256, 96), r(24, 4096), r(2, 4, 1024)
    q, cache, table = r(1, 32, 128), r(6, 64, 128), torch.tensor([[3, 1, 5, 2]], dtype=torch.int32)
    cu, start, w_TH = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([254], dtype=torch.int32), r(1, 32)
    wkv, wgate, ape, state, weight, angle = r(128, 256), r(128, 256), r(4, 128), r(6, 64, 256), r(64), r(1, 16)
    w, sink, scale, base = r(130, 256), r(32), r(3), r(24)
    end = torch.tensor([255], dtype=torch.int32)
    return {
        "linear": lambda: products._linear(x, w),
        "moe_mlp": lambda: products._moe_mlp(x, ids, torch.ones(3, 2), w13, w2, limit=7.0),
        "hc_pre": lambda: streams_op(streams, fn, scale, base),
        "attention": lambda: paged._sparse_attention(q, cache, table, sink, cu, start, scale=0.1, window=200),
        "index": lambda: paged._index_topk(q, w_TH, cache, table, cu, torch.tensor([255], dtype=torch.int32), ratio=1, topk=40),
        "compress": lambda: paged._compress(
            x[:1], wkv, wgate, ape, weight, angle.cos(), angle.sin(), state.clone(), table, cu, end, ratio=4, eps=1e-6
        ),
    }


def streams_op(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    return torch.cat([t.flatten() for t in streams._hc_pre(x, fn, scale, base, norm_eps=1e-6, hc_eps=1e-6, iters=20)])


@built
@pytest.mark.parametrize("name", sorted(_threaded()))
def test_threads_do_not_change_a_bit(name: str) -> None:
    call, before = _threaded()[name], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call()
        torch.set_num_threads(3)
        for _ in range(20):
            assert torch.equal(call(), alone)
    finally:
        torch.set_num_threads(before)


@built
def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    calls, before = _threaded(), torch.get_num_threads()
    wanted = {name: call() for name, call in calls.items()}

    def repeat(name: str) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(calls[name](), wanted[name]) for _ in range(50))

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(repeat, sorted(calls)))
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_with_helpers_of_its_own() -> None:
    call, before = _threaded()["linear"], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = call()
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that waits for the parent's helpers ends here
            os._exit(0 if all(torch.equal(call(), wanted) for _ in range(50)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize(
    "op", ["linear", "moe_mlp", "sparse_attention", "compress", "index_topk", "rope", "hc_post", "cache_insert"]
)
def test_what_the_shape_rule_refuses_is_not_computed(op: str) -> None:
    impl = CONTRACTS[op].impls["cpu_native"]
    args = tuple(
        torch.zeros(1, 2, 3, 4) for p in inspect.signature(impl.fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    )
    numbers = {"scale": 1.0, "limit": 1.0, "window": 1, "ratio": 1, "topk": 1, "eps": 0.1}
    kwargs = {
        n: numbers[n] for n, p in inspect.signature(impl.fn).parameters.items() if p.kind is p.KEYWORD_ONLY and n in numbers
    }
    assert impl.when is not None and impl.when(*args, **kwargs) is False
    with pytest.raises(ValueError, match="shapes or types that its shape rule refuses"):
        impl.fn(*args, **kwargs)


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
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, float("nan")])
    assert library.native().best(False, scores, 4).tolist() == [1, 2, 3, 6]


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
    library.native()
    assert float(torch.tensor(1e-40) * 1.0) > 0
