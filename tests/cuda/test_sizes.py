"""Launch sizes that the samples are too small to reach: split rows and none, large tiles, choices in segments, scores in turns."""

from __future__ import annotations

import pytest
import torch

from backends.cuda_triton import attention, choice, experts, hyper, indexer
from ops.contract import Sample
from ops.experts_math import roundtrip_activation
from ops.judge import judge
from tests.cuda.test_kernels import impl_of, runnable, taken
from tools.bench import cuda_attention
from tools.bench.cuda_cases import Widths

BF16 = torch.bfloat16


def judged(name: str, *wanted: str, dtype: torch.dtype = BF16, seed: int = 0) -> int:
    """Judge the samples of these names (none: all); how many there were."""
    contract, impl = impl_of(name)
    samples = [s for s in taken(contract, impl, dtype, seed) if not wanted or s.name in wanted]
    for sample in samples:
        verdict = judge(contract, runnable(contract, impl), sample)
        assert verdict.ok, str(verdict)
    return len(samples)


@pytest.mark.parametrize("heads,rows,splits,placed", [(16, 16, 1, False), (16, 16, 7, True), (64, 64, 1, True), (16, 32, 40, False)])
def test_attention_with_rows_split_and_not(monkeypatch: pytest.MonkeyPatch, heads: int, rows: int, splits: int, placed: bool) -> None:
    monkeypatch.setattr(attention, "plan", lambda *sizes: attention.Plan(heads, rows, splits, 4, 2, placed))
    names = ("window-edges", "ragged-csa", "csa-sentinels", "hca-128", "large-sinks", "sharp", "flash-csa", "packed-csa", "packed-hca")
    assert judged("sparse_attention", *names) == len(names)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
@pytest.mark.parametrize("batch,new,context", [(1, 3, 100), (2, 1, 3), (1, 2, 400), (3, 1, 300)])
def test_attention_with_layouts_by_hand(
    monkeypatch: pytest.MonkeyPatch, batch: int, new: int, context: int, kind: str, rows: int
) -> None:
    """Contexts shorter than the window, rows that are not there, one and several tiles; 128 heads are two programs."""
    contract, impl = impl_of("sparse_attention")
    monkeypatch.setattr(attention, "plan", lambda *sizes: attention.Plan(64, 64, 1, 8, 3, True, rows))
    case = cuda_attention.attention(Widths(heads=128 if batch == 2 else 64, topk=20), kind, batch, new, context)
    inputs = case.make(torch.Generator().manual_seed(0))
    launched = []
    module = attention.kernels("attention_hopper")
    kernel = module.attend_ahead if rows == 32 else module.attend_placed
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *a, **k: (launched.append(k["grid"]), run(*a, **k))[1])
    verdict = judge(contract, runnable(contract, impl), Sample(case.name, inputs.args, inputs.kwargs))
    assert verdict.ok, str(verdict)
    assert launched == [(batch * new, 2 if batch == 2 else 1)]


def test_a_plan_splits_few_queries_and_leaves_many_whole() -> None:
    def splits(tokens: int, heads: int, steps: int, chosen: bool = True) -> int:
        return attention.plan(tokens, heads, steps, False, chosen).splits

    assert (splits(1, 64, 20), splits(1, 64, 260, False), splits(32, 64, 20)) == (20, 128, 4)
    assert splits(128, 64, 20) == splits(4096, 64, 20) == splits(4096, 64, 5, False) == splits(1, 3, 1) == 1
    assert attention.plan(4096, 64, 20, False, True).placed and not attention.plan(4096, 64, 20, False, False).placed
    assert not attention.plan(4096, 64, 20, False, True).by_hand  # until a device has judged it
    assert (attention.plan(4096, 64, 40, False, False).rows, attention.plan(4096, 64, 5, False, False).rows) == (64, 32)


def test_choices_of_long_rows_go_through_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    run = choice.kernels("choice").peaks.run

    def counting(*args: object, grid: tuple[int, ...], **kwargs: object) -> object:
        counted.append(kwargs["LEVELS"])
        return run(*args, grid=grid, **kwargs)

    monkeypatch.setattr(choice, "sizes", lambda *counts: choice.Sizes(16, 2, 512))
    monkeypatch.setattr(choice, "_READ", 64)
    monkeypatch.setattr(choice.kernels("choice").peaks, "run", counting)
    names = ("decode", "chunk", "ties", "ties-equal", "ties-fp4", "fp8-keys", "ragged")
    assert judged("index_topk", *names) >= 6
    assert len(counted) >= 5 and max(counted) > 1


def test_scores_are_taken_in_turns_where_they_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "_SCRATCH", 256)
    monkeypatch.setattr(indexer, "_TOGETHER", 4)
    assert judged("index_topk", "ragged", "odd", "around-topk", "fp8-keys") == 4


@pytest.mark.parametrize("rows,columns", [(16, 128), (64, 128), (16, 64)])
@pytest.mark.parametrize("op", ["grouped_experts", "grouped_experts_fp4"])
def test_experts_with_tiles_of_either_height(monkeypatch: pytest.MonkeyPatch, op: str, rows: int, columns: int) -> None:
    """FP4: 64 columns of a group of 128 are rounded by a kernel of its own."""
    sizes = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(experts, "_plan", lambda *counts: dict(sizes))
    monkeypatch.setattr(experts, "_fp4_plan", lambda *counts: dict(sizes))
    assert judged(op, "many", "many-plain", "all-on-one", "odd", "one") >= 4


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_mixes_of_many_tokens(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(hyper, "_split", lambda tokens, wide: {"rows": 64, "block": 64, "chunk": 64, "splits": -(-wide // 64)})
    assert judged("hc_pre", "odd-unit", "odd-huge", "two-tiny", "steep", dtype=dtype) == 4


def test_rows_are_rounded_to_float8_as_the_reference_rounds_them() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=g) * torch.logspace(-5, 4, 64)[:, None]
    # largest values at, just above and just below the power of two that 448 fits into
    for i, top in enumerate((448.0, 450.0, 446.0, 1.75, 1.7578125, 1.7421875, 0.0, 1e-4)):
        x[i] = x[i] / x[i].abs().amax() * top * 0.9
        x[i, [3, 130]] = top
        # subnormal codes, whose steps show by how much was scaled
        x[i, 4:100] = top * 2.0**-16 * torch.randn(96, generator=g)
    x = x.bfloat16()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # tiles of 16 rows of experts with 40, 0 and 24 rows, channels first; rounded on the way there, or in place
    counts, module = torch.tensor([40, 0, 24], device=device), experts.kernels("experts_fp4")
    expected = roundtrip_activation(x, torch.float64)
    for at_once in (True, False):
        out = torch.empty(5, 256, 16, dtype=BF16, device=device)
        module.prepare[(2, 5)](x.to(device), counts, out, 3, 256, QUANTIZE=at_once, EXPERTS=4, BLOCK_M=16, BLOCK=128, num_warps=4)
        if not at_once:
            module.round_tiles[(2, 5)](out, counts, 3, 256, EXPERTS=4, BLOCK_M=16, num_warps=4)
        rows = torch.cat([tile.T[:n] for tile, n in zip(out.cpu(), (16, 16, 8, 16, 8), strict=True)])
        assert torch.equal(rows.double(), expected)
