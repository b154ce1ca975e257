"""What the quantised modes of the Ascend chips cost in accuracy, on the CPU stand-in: `python -m tools.ascend_modes --soc a3`.

Per mode: the error of each product at Flash's widths against the product of the unquantised operands, and the nano model's logits against
its bf16 run on the same chip. Nothing here runs on an NPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import v4
from backends.ascend.recipes import TARGETS
from ops.registry import bind
from tools.npu_standin.install import install
from tools.runconfig import named_config
from v4.convert import convert
from v4.make import make
from v4.packing import quantise_fp4, quantise_fp8, quantise_int8

TOKENS = 200
_D, _I, _ROWS = 4096, 2048, 8
"""Flash's hidden width and expert width, and rows of a product."""


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def _stacked(quantise: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantise(weight[0])
    return codes[None], scale[None]


def product_errors(ops: SimpleNamespace, kind: str) -> dict[str, float]:
    """Op -> RMS error of its result as a share of the RMS of the product without quantisation; normal random operands."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _D, generator=g).bfloat16()
    w = torch.randn(_I, _D, generator=g) * _D**-0.5
    w13 = torch.randn(1, 2 * _I, _D, generator=g) * _D**-0.5
    w2 = torch.randn(1, _D, _I, generator=g) * _I**-0.5
    exact = x.float() @ w.T
    gate, up = (x.float() @ w13[0].T).chunk(2, -1)
    experts = (torch.nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)) @ w2[0].T
    routing = torch.zeros(_ROWS, 1, dtype=torch.int32), torch.ones(_ROWS, 1)
    none = torch.zeros(2 * _I, _D), torch.zeros(_D, _I)  # a shared expert that adds nothing
    if kind == "int8":
        codes, scale = ops.quant_int8(x)
        linear = ops.linear_int8(codes, *quantise_int8(w), x_scale=scale, out_dtype=torch.bfloat16)
        packed = [t for weight in (w13, w2) for t in _stacked(lambda t: quantise_int8(t, torch.bfloat16), weight)]
        packed += [t for weight in none for t in quantise_int8(weight)]
        return {"linear_int8": _error(linear, exact), "moe_int8": _error(ops.moe_int8(x, *routing, *packed, limit=10.0), experts)}
    codes, scale = ops.quant_mxfp8(x)
    linear = ops.linear_mx(codes, *quantise_fp8(w), x_scale=scale, out_dtype=torch.bfloat16)
    packed = [t for weight in (w13, w2) for t in _stacked(quantise_fp4, weight)]
    packed += [t for weight in none for t in quantise_fp8(weight)]
    return {"linear_mx": _error(linear, exact), "moe_mx": _error(ops.moe_mx(x, *routing, *packed, limit=10.0), experts)}


def mean_kl(p_TV: Tensor, q_TV: Tensor) -> float:
    """Mean over positions of KL(softmax(p) || softmax(q)) in nats."""
    return float((p_TV.softmax(-1) * (p_TV.log_softmax(-1) - q_TV.log_softmax(-1))).sum(-1).mean())


def same_choice(p_TV: Tensor, q_TV: Tensor) -> float:
    """Share of positions whose most likely token is the same."""
    return float((p_TV.argmax(-1) == q_TV.argmax(-1)).float().mean())


def measure(soc: str, target: str) -> dict[str, Any]:
    """{target, kl, top1, bf16_kl, bf16_top1, products}: bf16_* compare the bf16 run with fp32 on the CPU, as a scale for the others."""
    mode = TARGETS[target]
    os.environ["V4_ASCEND_SOC"] = soc
    install(soc)
    ids = [0, *((7919 * i) % 1000 + 5 for i in range(TOKENS - 1))]
    with tempfile.TemporaryDirectory() as folder:
        hub, stored = Path(folder) / "hub", Path(folder) / "stored"
        make(named_config("nano"), hub, 0)
        convert(hub, stored, mode.kind)
        exact = v4.load(hub, backend="cpu", dtype=torch.float32, max_context=512).logits(ids)
        bf16 = v4.load(hub, backend="ascend", max_context=512).logits(ids)
        found = v4.load(stored, backend="ascend", numerics=mode.numerics, max_context=512).logits(ids)
    return {
        "target": target,
        "kl": mean_kl(bf16, found),
        "top1": same_choice(bf16, found),
        "bf16_kl": mean_kl(exact, bf16),
        "bf16_top1": same_choice(exact, bf16),
        "products": product_errors(bind(("ascend",), dtype=torch.bfloat16).ops, mode.kind),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure one mode, or those of a chip; one process per chip."""
    options = argparse.ArgumentParser(prog="python -m tools.ascend_modes", description=__doc__)
    options.add_argument("--soc", choices=("a2", "a3", "950"), required=True)
    options.add_argument("--json", action="store_true")
    args = options.parse_args(argv)
    found = [measure(args.soc, target) for target in TARGETS if f"-{args.soc}-" in target]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("| mode | KL to bf16 | top-1 as bf16 | bf16 to fp32: KL, top-1 | error of each product |\n|---|---|---|---|---|")
    for row in found:
        products = ", ".join(f"{op} {error:.2%}" for op, error in row["products"].items())
        print(f"| {row['target']} | {row['kl']:.4f} | {row['top1']:.1%} | {row['bf16_kl']:.4f}, {row['bf16_top1']:.1%} | {products} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
