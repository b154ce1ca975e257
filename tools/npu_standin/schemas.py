"""Schemas of the vendor's ops as text: what a released package registers, one op a line, and their definition where no package does.

torch_npu.txt was dumped from the imported wheel 2.13.0; custom.txt from cann-recipes-infer's binding; _C_ascend.txt and
cann_ops_transformer.txt were read from the sources of vllm-ascend and ops-transformer; v4_ascend.txt is what backends/ascend/csrc registers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("schemas")
FILES = {
    "npu": "torch_npu.txt",
    "custom": "custom.txt",
    "cann_ops_transformer": "cann_ops_transformer.txt",
    "_C_ascend": "_C_ascend.txt",
    "v4_ascend": "v4_ascend.txt",
}
"""Namespace -> file. torch_npu.txt also has lines of other namespaces."""
PACKAGES = ("custom", "cann_ops_transformer", "_C_ascend")
"""Namespaces that packages beside torch_npu bring."""


@functools.cache
def lines(namespace: str) -> tuple[str, ...]:
    """Schema lines of a namespace. ValueError for one that has no file."""
    if namespace not in FILES:
        raise ValueError(f"no schemas of namespace {namespace!r}; known: {', '.join(FILES)}")
    text = (FOLDER / FILES[namespace]).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.startswith(f"{namespace}::"))


@functools.cache
def schema(name: str) -> torch.FunctionSchema:
    """The parsed schema of "npu::npu_rms_norm" (or with an overload, "npu::x.out"). ValueError when no file has it."""
    for line in lines(name.partition("::")[0]):
        if line.partition("(")[0] == name:
            return torch._C.parse_schema(line)
    raise ValueError(f"no schema of {name!r} in {FILES[name.partition('::')[0]]}")


def defined() -> frozenset[str]:
    """Names, with overloads, of all ops that torch knows now."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def define(namespace: str) -> torch.library.Library:
    """Define every op of a namespace that torch does not know yet. The result must be kept alive."""
    library = torch.library.Library(namespace, "FRAGMENT")
    known = defined()
    for line in lines(namespace):
        if line.partition("(")[0] not in known:
            library.define(line.partition("::")[2])
    return library
