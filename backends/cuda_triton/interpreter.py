"""Triton's interpreter made right where it is wrong, so that kernels can be judged without a GPU. The kernels know nothing of it.

Defects of Triton 3.6's interpreter, each with the repair below: a cast to bf16 truncates; casts to and from float8 err in some values;
a product of bf16 operands multiplies their bit patterns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def _torch_types() -> dict[Any, tuple[torch.dtype, torch.dtype | None]]:
    import triton.language as tl

    # a type, and the integer that numpy holds it in where numpy does not know it
    return {
        tl.float64: (torch.float64, None),
        tl.float32: (torch.float32, None),
        tl.float16: (torch.float16, None),
        tl.bfloat16: (torch.bfloat16, torch.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }


def _as_torch(data: Any, dtype: torch.dtype, held: torch.dtype | None) -> torch.Tensor:
    plain = np.ascontiguousarray(data)
    if held is None:
        return torch.from_numpy(plain)
    return torch.from_numpy(plain.view(np.int16 if held is torch.int16 else np.uint8)).view(dtype)


def repair() -> None:
    """Replace the wrong operations of the interpreter. Call it once, before the first kernel runs; calling again changes nothing."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_for_v4", False):
        return
    types = _torch_types()
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def convert(src: Any, target: Any) -> Any:
        source, wanted = types[src.dtype.scalar], types[target]
        value = _as_torch(src.data, *source).to(wanted[0])
        if wanted[1] is not None:
            value = value.view(wanted[1])
        data = value.numpy().reshape(np.shape(src.data))
        return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(target)), target)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        odd = any(types[t][1] is not None for t in (source, target) if t in types)
        return convert(src, target) if odd and source in types and target in types else plain_cast(self, src, dst_type)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return convert(src, dst_type.scalar)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        import triton.language as tl

        narrow = {t for t, (_, held) in types.items() if held is not None}
        wide = [convert(x, tl.float32) if x.dtype.scalar in narrow else x for x in (a, b)]
        return plain_dot(self, *wide, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
    builder.repaired_for_v4 = True
