"""Op contracts: what each op means. Importing this package declares all of them; it imports torch only."""

import os

# torch would load every vendor extension it finds while it is imported, and a broken one would stop it; the backend of that vendor loads its own
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from ops import (
    attention,
    cache,
    comm,
    compress,
    hyper,
    indexer,
    linear,
    linear_mx,
    moe,
    moe_layer,
    norm,
    norm_quant,
    quant,
    rope,
    sample,
)
from ops.contract import CONTRACTS, Contract, Cost, Sample, WrongInput
from ops.registry import Binding, NoImplementation, bind

__all__ = ["CONTRACTS", "Binding", "Contract", "Cost", "NoImplementation", "Sample", "WrongInput", "bind"]
__all__ += ["attention", "cache", "comm", "compress", "hyper", "indexer", "linear", "linear_mx", "moe", "moe_layer", "norm"]
__all__ += ["norm_quant", "quant", "rope", "sample"]
