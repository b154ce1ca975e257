"""Mutants of every op (the judge must reject each of them) and legal variants (it must accept each)."""

from importlib import import_module

from ops.mutants.core import LEGAL, MUTANTS, Variant, rounded_reference, samples_by_size
from ops.mutants.plant import Plant

__all__ = ["FAMILIES", "LEGAL", "MUTANTS", "Plant", "Variant", "rounded_reference", "samples_by_size"]

FAMILIES = (
    "attention",
    "cache",
    "cache_packed",
    "compress",
    "experts",
    "experts_int8",
    "gate",
    "generic",
    "hyper",
    "indexer",
    "linear",
    "linear_stored",
    "moe",
    "moe_layer",
    "norm",
    "quant",
    "quant_codes",
    "quant_int8",
    "rope",
    "sample",
)
"""Modules of this package that declare variants."""

for _family in FAMILIES:
    import_module(f"ops.mutants.{_family}")
