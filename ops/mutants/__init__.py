"""Mutants of every op (the judge must reject each of them) and legal variants (it must accept each)."""

from ops.mutants import attention, compress, gate, generic, hyper, indexer, norm, rope
from ops.mutants.core import LEGAL, MUTANTS, Variant, rounded_reference, samples_by_size
from ops.mutants.plant import Plant

__all__ = [
    "LEGAL",
    "MUTANTS",
    "Plant",
    "Variant",
    "attention",
    "compress",
    "generic",
    "indexer",
    "rounded_reference",
    "samples_by_size",
]
