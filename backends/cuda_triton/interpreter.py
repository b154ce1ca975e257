"""Triton's interpreter made right where it is wrong, so that kernels can be judged without a GPU. The kernels know nothing of it.

Defects of Triton 3.6's interpreter, each with the repair below: a cast to bf16 truncates; casts to and from float8 err in some values;
a product of bf16 operands multiplies their bit patterns; a product with scaled e2m1 operands is missing.
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


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def _e2m1(codes: Any, scales: Any) -> Any:
    """fp32 [N, K] of packed e2m1 [N, K/2], low nibble first, times e8m0 bytes [N, K/32]."""
    values = _E2M1[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(codes.shape[0], -1)
    return values * np.repeat(np.ldexp(np.float32(1), scales.astype(np.int32) - 127), 32, axis=1)


def repair() -> None:
    """Replace the wrong operations of the interpreter. Call it once, before the first kernel runs; calling again changes nothing."""
    from triton.language import semantic
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

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, fast: bool, a_packed: bool, b_packed: bool, acc: Any
    ) -> Any:
        import triton.language as tl

        if (a_kind.name, b_kind.name, a_packed, b_scale) != ("E2M1", "BF16", True, None):
            raise NotImplementedError(f"tl.dot_scaled of {a_kind.name} and {b_kind.name}: the interpreter has e2m1 with scales x bf16 only")
        weight = interpreter.TensorHandle(_e2m1(a.data, a_scale.data), tl.float32)
        return plain_dot(self, weight, convert(b, tl.float32), acc, None, 0)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
    builder.create_dot_scaled = dot_scaled
    plain_scaled = semantic.TritonSemantic.dot_scaled

    def with_names(self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any) -> Any:
        import triton.language as tl

        # names of formats arrive as plain strings, not as the compiler passes them
        return plain_scaled(self, a, a_scale, tl.constexpr(a_kind), b, b_scale, tl.constexpr(b_kind), *rest)

    semantic.TritonSemantic.dot_scaled = with_names
    builder.repaired_for_v4 = True

    from backends.cuda_triton.kernels import attention_hopper, interpreter_gluon

    interpreter_gluon.adapt(attention_hopper)
