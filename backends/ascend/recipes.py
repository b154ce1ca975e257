"""Precision modes of the chips as weight preparation: which storage of a checkpoint each one multiplies."""

from __future__ import annotations

from typing import NamedTuple


class Mode(NamedTuple):
    """`kind`: storage of the converted checkpoint; `chips` it is for; `numerics` to run it with; what it is, in a sentence."""

    kind: str
    chips: tuple[str, ...]
    numerics: str
    what: str


TARGETS = {
    "ascend-a2-w8a8": Mode("int8", ("910b",), "stored", "INT8 weights per channel, INT8 activations per token"),
    "ascend-a3-w8a8": Mode("int8", ("910_93",), "stored", "INT8 weights per channel, INT8 activations per token"),
    "ascend-950-mx": Mode("mx", ("950",), "stored", "FP8 weights and activations, MXFP4 experts, scales powers of two; a hub checkpoint keeps its bits"),
}
"""Name on the command line -> mode. bf16 needs no conversion: --numerics exact dequantises while loading."""
