"""The trained nano model's Sinkhorn kernels: values and gradients under the interpreter, and both directions compiled for Hopper."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tools.nano import sinkhorn
from tools.nano.sinkhorn_kernel import apply

COMPILE = """
import torch
from tools.cuda_aot import compiling
from tools.nano.sinkhorn_kernel import apply

found = []
with compiling(found):
    logits = torch.empty(300, 4, 4, device="meta", requires_grad=True)
    apply(logits, 20, 1e-6).sum().backward()
for name, grid, compiled in found:
    print(name, grid, len(compiled.asm["cubin"]))
"""


def test_values_and_gradients_are_those_of_the_plain_version() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert sinkhorn.check(apply, device) < 1e-5
    assert sinkhorn.check(lambda z, iters, eps: apply(z, iters - 1, eps), device) > 1e-5, "the check sees a missing step"


def test_both_directions_compile_for_hopper() -> None:
    # the interpreter knows no types: a loop whose variable changes type fails only when it is compiled
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"(\w+) \(5,\) [1-9]\d*", done.stdout) == ["_forward", "_backward"]
