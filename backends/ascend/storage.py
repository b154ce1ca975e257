"""Which stored weights a chip can multiply."""

from __future__ import annotations

from backends.ascend.chips import WITHOUT_FP8
from backends.ascend.probe import probe
from backends.ascend.recipes import TARGETS


def refusal(linears: str, experts: str) -> str | None:
    """Why a checkpoint whose products run as stored ("fp8", "fp4", "int8", "dense") can not run on this chip, or None."""
    soc = probe().soc
    packed = sorted({linears, experts} & {"fp8", "fp4"})
    if soc not in WITHOUT_FP8 or not packed:
        return None
    target = next(name for name, mode in TARGETS.items() if soc in mode.chips)
    return (
        f"this checkpoint keeps its weights in {' and '.join(p.upper() for p in packed)}, and SoC {soc} has no arithmetic for them: convert it "
        f"(v4 checkpoint convert DIR --target {target} --out OUT), or dequantise while loading (--numerics exact)"
    )


def kinds(linears: str, experts: str) -> tuple[str, str]:
    """How this chip multiplies what is stored: on 950 the hub's FP8 and FP4 weights with MXFP8 activations, everything else as it is."""
    return ("mx", "mx") if probe().soc == "950" and (linears, experts) == ("fp8", "fp4") else (linears, experts)
