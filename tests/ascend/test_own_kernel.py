"""The Ascend C source of the own op, read as plain C++: g++ compiles it against a few host functions of ours (kernel_host), core after core.

This finds slips in indices and arithmetic. It is not CANN's compiler and no chip: alignment, pipes and memory are not there, and the kernel
remains uncompiled and never run as what it is.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import backends.ascend
from ops.contract import CONTRACTS
from ops.judge import judge

SOURCE = Path(backends.ascend.__file__).with_name("csrc") / "op_kernel" / "v4_hc_head.cpp"
HOST = Path(__file__).with_name("kernel_host")
TYPES = {torch.float32: "float", torch.float16: "_Float16"}
pytestmark = [pytest.mark.standin, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


class Tiling(ctypes.Structure):
    """V4HcHeadTilingData, in the order of op_host/v4_hc_head_tiling.h."""

    _fields_ = [(n, ctypes.c_uint32) for n in ("tokens", "width", "tile", "per_core")] + [(n, ctypes.c_float) for n in ("norm_eps", "hc_eps")]


def compiled(folder: Path, dtype: torch.dtype, source: str) -> ctypes.CDLL:
    name = TYPES[dtype].strip("_")
    (folder / f"{name}.cpp").write_text(
        source + '\nextern "C" void run_on_core(uint32_t core, GM_ADDR a, GM_ADDR b, GM_ADDR c, GM_ADDR d, GM_ADDR e, GM_ADDR f, GM_ADDR t)'
        "\n{\n    this_core = core;\n    v4_hc_head(a, b, c, d, e, f, t);\n}\n"
    )
    command = ("g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{HOST}", f"-DDTYPE_STREAMS={TYPES[dtype]}", f"{name}.cpp", "-o", f"{name}.so")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and "_Float16" in done.stderr and dtype == torch.float16:
        pytest.skip("this g++ has no _Float16; 12 has")
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(folder / f"{name}.so"))


def kernel(library: ctypes.CDLL, cores: int) -> Callable[..., Tensor]:
    def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
        tokens, _, width = streams.shape
        tile = next(t for t in range(2048, 0, -64) if width % t == 0)
        per_core = -(-tokens // cores)
        out = torch.full((tokens, width), float("nan"), dtype=streams.dtype)
        tiling = Tiling(tokens, width, tile, per_core, norm_eps, hc_eps)
        memory = [ctypes.c_void_p(t.data_ptr()) for t in (streams, fn, scale, base, out)]
        for core in range(-(-tokens // per_core)):
            library.run_on_core(ctypes.c_uint32(core), *memory, None, ctypes.byref(tiling))
        return out

    return hc_head


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_arithmetic_of_the_kernel_meets_the_contract(dtype: torch.dtype, tmp_path: Path) -> None:
    library = compiled(tmp_path, dtype, SOURCE.read_text(encoding="utf-8"))
    samples = [s for s in CONTRACTS["hc_head"].samples(dtype, 0) if {"one", "flash", "pro"} & set(s.tags)]
    assert len(samples) == 9
    for cores in (1, 2):
        wrong = [str(v) for s in samples if not (v := judge(CONTRACTS["hc_head"], kernel(library, cores), s)).ok]
        assert not wrong, "\n".join(wrong)


FAULTS = {
    "streams swapped": ("* STREAMS + stream)", "* STREAMS + (stream ^ 1))"),
    "weights of the first tile": ("fn_[stream * width_ + channel]", "fn_[stream * width_]"),
    "mean over one stream": ("static_cast<float>(STREAMS * width_)", "static_cast<float>(width_)"),
    "base lost": ("Add(logit, logit, root, SMALL);", ""),
    "hc_eps lost": ("Adds(logit, logit, hc_eps_, SMALL);", ""),
    "last token lost": ("token < last_", "token + 1 < last_"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_slip_in_the_source_is_seen(fault: str, tmp_path: Path) -> None:
    text, there = SOURCE.read_text(encoding="utf-8"), FAULTS[fault]
    assert text.count(there[0]) == 1
    for folder in ("right", "wrong"):
        (tmp_path / folder).mkdir()
    right, library = (compiled(tmp_path / n, torch.float32, t) for n, t in (("right", text), ("wrong", text.replace(*there))))
    eps = {"norm_eps": 1e-6, "hc_eps": 0.1}  # the model's 1e-6 is below the bound of fp32
    samples = [replace(s, kwargs=eps) for s in CONTRACTS["hc_head"].samples(torch.float32, 0) if {"flash", "pro"} & set(s.tags)]
    assert all(judge(CONTRACTS["hc_head"], kernel(right, 1), s).ok for s in samples)
    assert not all(judge(CONTRACTS["hc_head"], kernel(library, 1), s).ok for s in samples)
