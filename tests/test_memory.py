"""Large-page host memory: shapes, types, alignment, independence, and the fallback for small tensors."""

from __future__ import annotations

import mmap

import pytest
import torch

from v4 import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_tensors_are_ordinary_and_page_aligned(dtype: torch.dtype) -> None:
    shape = (memory.PAGE // dtype.itemsize // 64, 65)
    t = memory.empty(shape, dtype)
    assert t.shape == shape and t.dtype == dtype and t.is_contiguous()
    t.view(torch.uint8).fill_(7)
    assert t.view(torch.uint8).sum(dtype=torch.int64) == 7 * t.numel() * dtype.itemsize
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert t.data_ptr() % memory.PAGE == 0


def test_two_tensors_do_not_share_memory_and_outlive_their_maker() -> None:
    a, b = (memory.empty((memory.PAGE,), torch.uint8) for _ in range(2))
    a.fill_(1)
    b.fill_(2)
    assert a.unique().tolist() == [1]


def test_small_and_empty_tensors_take_ordinary_memory() -> None:
    assert memory.empty((3, 4), torch.float32).shape == (3, 4)
    assert memory.empty((0, 4), torch.float32).numel() == 0


def test_a_system_that_refuses_large_pages_gets_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert memory.empty((memory.PAGE,), torch.uint8).shape == (memory.PAGE,)
