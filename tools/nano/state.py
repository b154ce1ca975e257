"""What a run leaves behind to go on from: the whole state, or a small one for where every byte has to travel.

The small state keeps weights in three of their four bytes and AdamW's averages in bf16, and drops Muon's momentum, which is
back after some twenty steps: a run resumed from it is not bit for bit the run that was never stopped; from the whole one it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.nano.model import Nano
from tools.nano.optimiser import Optimiser

WHOLE, SMALL = "state.pt", "small.pt"


def shorten(x: Tensor) -> Tensor:
    """fp32 -> uint8 [numel, 3]: the upper three bytes, rounded."""
    bits = x.detach().cpu().contiguous().view(-1).view(torch.int32) + 0x80
    return bits.view(torch.uint8).view(-1, 4)[:, 1:].clone()


def lengthen(parts: Tensor, shape: torch.Size) -> Tensor:
    """uint8 [numel, 3] -> fp32 of `shape`."""
    whole = torch.zeros(parts.shape[0], 4, dtype=torch.uint8)
    whole[:, 1:] = parts
    return whole.view(-1).view(torch.float32).view(shape)


def _write(path: Path, state: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def save(folder: Path, model: Nano, optimiser: Optimiser, step: int, fixed: dict[str, Any]) -> None:
    """Write both states, each whole or not at all."""
    common = {"fixed": fixed, "step": step}
    _write(folder / WHOLE, {**common, "model": model.state_dict(), "optimiser": optimiser.state()})
    short = {k: shorten(v) if v.dtype is torch.float32 else v.cpu() for k, v in model.state_dict().items()}
    adam = {
        i: {k: v.bfloat16().cpu() if k.startswith("exp_avg") else v.cpu() for k, v in values.items()}
        for i, values in optimiser.adam.state_dict()["state"].items()
    }
    _write(folder / SMALL, {**common, "short": short, "adam": adam})


def load(path: Path, model: Nano, optimiser: Optimiser, fixed: dict[str, Any]) -> int:
    """Fill model and optimiser from either state; the number of steps done. ValueError when the file is of other settings."""
    device = model.embed.weight.device
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["fixed"] != fixed:
        raise ValueError(f"{path}: made with {state['fixed']}, this run has {fixed}; a resumed run needs the same")
    if "model" in state:
        model.load_state_dict(state["model"])
        optimiser.load(state["optimiser"])
        return int(state["step"])
    shapes = model.state_dict()
    values = {k: lengthen(v, shapes[k].shape) if shapes[k].dtype is torch.float32 else v for k, v in state["short"].items()}
    model.load_state_dict(values)
    groups = optimiser.adam.state_dict()["param_groups"]
    adam = {i: {k: v.float().to(device) for k, v in parts.items()} for i, parts in state["adam"].items()}
    optimiser.adam.load_state_dict({"state": adam, "param_groups": groups})
    return int(state["step"])
