"""Blocks whose elements lie behind 2^31: kernels count them in 64 bits, or in units that keep the numbers small.

Ascend operator notes, section 10: another kernel's 32-bit addresses were wrong from block 29,077 on. Each fault is planted in a cache that has as
much memory in front of its first block, so that an address that wraps round reads other rows instead of stopping the process. Only pages that
are touched are ever in memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.cuda_triton import attention as attention_file
from backends.cuda_triton.kernels import indexer as indexer_kernels
from ops import indexer
from ops.attention_samples import make
from ops.contract import CONTRACTS
from ops.registry import load_backend

load_backend("cuda_triton")
BF16, FAR = torch.bfloat16, 2**31

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="under the interpreter only: on a device the memory would be taken")


def far(cache: Tensor) -> tuple[Tensor, int]:
    """The blocks of a cache behind 2^31 elements of a larger one, in front of which as many lie; and how far they moved."""
    shift = FAR // (cache.shape[1] * cache.shape[2]) + 1
    memory = torch.empty(2 * shift + cache.shape[0], *cache.shape[1:], dtype=cache.dtype)
    memory[2 * shift :] = cache
    # where the wrapped addresses fall
    memory[: cache.shape[0] + 4] = 1
    return memory[shift:], shift


def run(op: str, *args: Any, **kwargs: Any) -> Tensor:
    impl = CONTRACTS[op].impls["cuda_triton"]
    assert impl.when is not None and impl.when(*args, **kwargs)
    found: Tensor = impl.fn(*args, **kwargs)
    return found


@triton.jit
def offset_in_32_bits(row_N: tl.tensor, valid_N: tl.tensor, table_ptr: tl.tensor, block_stride: tl.tensor, row_stride: tl.tensor, PER_BLOCK: tl.constexpr):
    safe_N = tl.where(valid_N, row_N, 0)
    block_N = tl.load(table_ptr + safe_N // PER_BLOCK, mask=valid_N, other=0)
    return block_N * block_stride + safe_N % PER_BLOCK * row_stride


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_index_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, w, cache, table, *rest), kwargs = indexer._sample(
        BF16, torch.Generator().manual_seed(0), [(150, 9), (80, 1)], d=64, heads=4, block_rows=64, topk=8
    )  # fmt: skip
    near = run("index_topk", q, w, cache, table, *rest, **kwargs)
    keys, shift = far(cache)
    assert torch.equal(run("index_topk", q, w, keys, table + shift, *rest, **kwargs), near)
    monkeypatch.setattr(indexer_kernels, "row_offset", offset_in_32_bits)
    assert torch.equal(run("index_topk", q, w, cache, table, *rest, **kwargs), near)
    assert not torch.equal(run("index_topk", q, w, keys, table + shift, *rest, **kwargs), near)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("part", ["window", "entries"])
def test_attention(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, plain = make(BF16, torch.Generator().manual_seed(0), [(50, 7)], ratio=4, topk=3, channels=64, block_rows=32, ordered=True)
    (q, cache, table, *rest), kwargs = args, dict(plain)
    near = run("sparse_attention", *args, **plain)
    if part == "window":
        cache, shift = far(cache)
        table = table + shift
    else:
        kwargs["cmp_cache"], shift = far(kwargs["cmp_cache"])
        kwargs["cmp_table"] = kwargs["cmp_table"] + shift
    assert torch.equal(run("sparse_attention", q, cache, table, *rest, **kwargs), near)
    monkeypatch.setattr(attention_file, "unit_of", lambda *a: 1)
    impl = CONTRACTS["sparse_attention"].impls["cuda_triton"]
    assert impl.when is not None and not impl.when(q, cache, table, *rest, **kwargs), "the rule leaves it to torch"
    assert torch.equal(impl.fn(*args, **plain), near)
    assert not torch.equal(impl.fn(q, cache, table, *rest, **kwargs), near), "and the kernel would be wrong"
