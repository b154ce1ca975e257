"""Times a few steps of every training stage on random token ids."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch

from tools.nano.batches import Batch
from tools.nano.fused import Fused
from tools.nano.layers import Mode
from tools.nano.model import Nano
from tools.nano.optimiser import Optimiser
from tools.nano.schedule import STAGES
from tools.nano.train import losses
from v4.config import Config


def _profile(model: Nano, optimiser: Optimiser, batch: Batch) -> None:
    """Print where one step spends its time: forward, backward and optimiser on the clock, then the costliest kernels."""
    device = batch.ids_BT.device

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    marks = [now()]
    total, _, _ = losses(model, batch, 0.3)
    marks.append(now())
    total.backward()
    marks.append(now())
    optimiser.step(1e-4)
    marks.append(now())
    print("forward, backward, optimiser:", *(f"{1000 * (b - a):.1f} ms" for a, b in pairwise(marks)), flush=True)
    with torch.profiler.profile() as seen:
        total, _, _ = losses(model, batch, 0.3)
        total.backward()
        optimiser.step(1e-4)
        now()
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=70), flush=True)


def report(args: argparse.Namespace, steps: int = 5) -> None:
    """Print milliseconds per step and memory by stage, and the number of steps that fit into args.seconds."""
    device = torch.device(args.device)
    if args.sinkhorn != "torch":
        from tools.nano.sinkhorn import check, sinkhorn

        print(f"sinkhorn kernel: largest difference {check(sinkhorn(args.sinkhorn), device):.2e}", flush=True)
    mode = Mode(fused=Fused(compiled=args.compiled, sinkhorn_kind=args.sinkhorn))
    model = Nano(Config.from_file(Path(args.config)), mode=mode, dtype=getattr(torch, args.dtype)).to(device).train()
    optimiser = Optimiser(model)
    mean = 0.0
    for stage in STAGES:
        stage.apply(mode)
        rows = max(1, args.tokens // stage.length)
        ids = torch.randint(0, model.config.vocab_size, (rows, stage.length), device=device)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.float32))
        began = time.perf_counter()
        seconds = 0.0
        for n in range(steps + 1):
            if n == 1:
                first, began = time.perf_counter() - began, time.perf_counter()
            total, _, loads = losses(model, batch, 0.3)
            total.backward()
            norm = float(optimiser.step(1e-4))
            model.balance(loads, 1e-3)
        seconds = (time.perf_counter() - began) / steps
        mean += stage.share * seconds
        if args.profile:
            _profile(model, optimiser, batch)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        print(
            f"{stage}: {1000 * seconds:.1f} ms, {ids.numel() / seconds:,.0f} tokens/s, first step {first:.1f} s, "
            f"{peak:.1f} GiB, loss {float(total.detach()):.3f}, norm {norm:.3f}", flush=True,
        )  # fmt: skip
    print(f"{args.seconds:.0f} s hold {int(args.seconds / mean)} steps of {args.tokens} tokens", flush=True)
