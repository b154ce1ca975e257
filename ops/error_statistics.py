"""Errors of a whole output: too large on the whole, leaning to one side, or a gain, though each single one is allowed.

An elementwise bound must leave room for the worst element. A bf16 accumulator or a truncation instead of a rounding can hide in
that room; over many elements neither can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.bounds import roundoff

EXCESS = 1.3
"""Largest allowed ratio of the RMS error to that of an ideal rounding, besides the contract's share of the bound's RMS."""
LEAN = 8.0
"""Largest allowed |z| of the signs of the errors, in standard deviations."""
GAIN = 2.0**-12
"""Largest common gain error of the rows, as a share of the result: a sixteenth of bf16's unit roundoff. Smaller ones say nothing."""
_FEWEST_ROWS = 16
_FEWEST = 64  # elements below which neither says anything


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def excess(y: Tensor, golden: Tensor, bound: Tensor, share: float) -> tuple[float, float] | None:
    """(RMS error, allowed) when the error as a whole is too large, else None. All float64 but y; finite elements only."""
    if y.numel() < _FEWEST:
        return None
    error = _rms(y.double() - golden)
    ideal = _rms(golden.to(y.dtype).double() - golden)
    allowed = EXCESS * ideal + _rms(bound) * share + torch.finfo(torch.float32).tiny
    return None if error <= allowed else (error, allowed)


def lean(y: Tensor, golden: Tensor, bound: Tensor) -> float | None:
    """z of the direction (towards or away from zero) in which y differs from the golden's own rounding, when beyond LEAN, else None.

    Against the rounding and not against the golden itself: few distinct values have few distinct, and then one-sided, rounding errors.
    Only elements whose bound is small beside the spacing of the output's type are counted.
    """
    off = (y.double() - golden.to(y.dtype).double()) * golden.sign()
    counted = (bound < roundoff(y.dtype) * golden.abs() / 8) & (off != 0)
    n = int(counted.sum())
    if n < _FEWEST:
        return None
    z = float(off[counted].sign().sum()) / n**0.5
    return z if abs(z) > LEAN else None


def gain(y: Tensor, golden: Tensor) -> tuple[float, float] | None:
    """(common gain error, t of its mean over the rows) when all rows are too large or too small together, else None.

    Roundings inside an op err to both sides, so that the gains of rows scatter around 1 however coarse the type; a factor or a
    truncation moves all of them. Each row's gain is the projection of its error on the golden row; the golden's own rounding is left
    out of it, which leans where many elements share one value, as at a clamp. y, golden [..., D], finite.
    """
    g = golden.reshape(-1, golden.shape[-1])
    size = g.square().sum(1)
    rows = size > 0
    if int(rows.sum()) < _FEWEST_ROWS:
        return None
    rounded = golden.to(y.dtype).double().reshape(g.shape)
    d = ((y.double().reshape(g.shape) - rounded)[rows] * g[rows]).sum(1) / size[rows]
    mean, spread = float(d.mean()), float(d.std()) / len(d) ** 0.5
    return (mean, mean / max(spread, 1e-30)) if abs(mean) > GAIN and abs(mean) > LEAN * spread else None
