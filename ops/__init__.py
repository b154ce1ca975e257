"""Op contracts: what each op means. Importing this package declares all of them; it imports torch only."""

from ops import attention, cache, comm, compress, hyper, indexer, linear, moe, norm, quant, rope, sample
from ops.contract import CONTRACTS, Contract, Cost, Sample, WrongInput
from ops.registry import Binding, NoImplementation, bind

__all__ = ["CONTRACTS", "Binding", "Contract", "Cost", "NoImplementation", "Sample", "WrongInput", "bind"]
__all__ += ["attention", "cache", "comm", "compress", "hyper", "indexer", "linear", "moe", "norm", "quant", "rope", "sample"]
