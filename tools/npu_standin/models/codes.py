"""The integers that name types in torch_npu calls: torch ScalarType numbers below 256, ACL types from 256 on."""

from __future__ import annotations

import torch

HIFLOAT8, FP4_E2M1 = "hifloat8", "float4_e2m1fn_x2"
"""Types that torch lacks; their values travel as uint8."""

_SCALAR_TYPES: dict[int, torch.dtype | str] = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16,
    23: torch.float8_e5m2, 24: torch.float8_e4m3fn, 44: torch.float8_e8m0fnu,
}  # fmt: skip
_ACL_TYPES: dict[int, torch.dtype | str] = {
    258: torch.int8, 283: torch.bfloat16, 290: HIFLOAT8, 291: torch.float8_e5m2, 292: torch.float8_e4m3fn,
    293: torch.float8_e8m0fnu, 296: FP4_E2M1,
}  # fmt: skip


def type_of(code: int | torch.dtype) -> torch.dtype | str:
    """The type that a `*_dtype` or `dst_type` argument names. ValueError for a number without a documented meaning."""
    if isinstance(code, torch.dtype):
        return code
    if code not in _SCALAR_TYPES and code not in _ACL_TYPES:
        raise ValueError(f"type number {code}; known: {sorted(_SCALAR_TYPES | _ACL_TYPES)}")
    return (_SCALAR_TYPES | _ACL_TYPES)[code]


def storage_of(kind: torch.dtype | str) -> torch.dtype:
    """The torch type in which values of `kind` travel."""
    return torch.uint8 if isinstance(kind, str) else kind
