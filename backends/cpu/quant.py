"""Quantisers in torch: the contracts' exact integer arithmetic already is the fast form on a CPU; Hadamard is one product."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ops import quant as contracts
from ops.contract import Contract
from ops.registry import signature


def _register(contract: Contract) -> None:
    fn = functools.partial(contract.reference, compute=torch.float32)

    @functools.wraps(contract.reference)
    def run(*args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN003, ANN202
        return fn(*args, **kwargs)

    run.__signature__ = signature(contract)  # type: ignore[attr-defined]
    contract.implement("cpu")(run)


for _contract in (
    contracts.quant_fp8,
    contracts.quant_mxfp8,
    contracts.quant_mxfp4,
    contracts.quant_int8,
    contracts.roundtrip_fp8,
    contracts.roundtrip_fp4,
):
    _register(_contract)


@contracts.dequant_fp8.implement("cpu")
def _dequant_fp8(q: Tensor, scale: Tensor, *, group: int = 128, dtype: torch.dtype) -> Tensor:
    return contracts.dequant_fp8.reference(q, scale, group=group, dtype=dtype, compute=torch.float32).to(dtype)


@contracts.dequant_fp8_block.implement("cpu")
def _dequant_fp8_block(w_NK: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return contracts.dequant_fp8_block.reference(w_NK, scale, dtype=dtype, compute=torch.float32).to(dtype)


@contracts.dequant_mxfp4.implement("cpu")
def _dequant_mxfp4(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return contracts.dequant_mxfp4.reference(q, scale, dtype=dtype, compute=torch.float32).to(dtype)


@contracts.dequant_int8.implement("cpu")
def _dequant_int8(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (q.float() * scale[:, None]).to(dtype)


@functools.lru_cache(maxsize=8)
def _matrix(n: int) -> Tensor:
    return contracts.hadamard.reference(torch.eye(n), compute=torch.float32)


@contracts.hadamard.implement("cpu")
def _hadamard(x: Tensor) -> Tensor:
    return (x.float() @ _matrix(x.shape[-1])).to(x.dtype)
