"""Making the vendor's ops callable in this process, backed by the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from tools.npu_standin import calls, functions, models, schemas
from tools.npu_standin.chips import Chip, chip

LEVELS = ("l2", "l3")
DEFAULT_PACKAGES = ("custom", "cann_ops_transformer")
"""What a node of cann-recipes has; vllm-ascend's package belongs to another torch."""

_alive: list[Any] = []
_installed: list[StandIn] = []


@dataclass(frozen=True)
class StandIn:
    """What was installed: the chip, the level, the packages beside torch_npu, whether torch_npu itself is the wheel, kernels left out."""

    chip: Chip
    level: str
    packages: tuple[str, ...]
    wheel: bool
    lacking: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where tensors of this level live."""
        return torch.device("npu" if self.level == "l3" else "cpu")


def has_wheel() -> bool:
    """Whether torch_npu is installed in this environment; nothing is imported."""
    return find_spec("torch_npu") is not None


def _filled(schema: torch.FunctionSchema, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every parameter by name; torch leaves out arguments that equal their default."""
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update({a.name: v for a, v in zip(schema.arguments, args, strict=False)})
    return {**values, **kwargs}


def _on_cpu(name: str, schema: torch.FunctionSchema, model: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        values = _filled(schema, args, kwargs)
        calls.note("vendor", name, values)
        return model(**values)

    return kernel


def _on_device(name: str, schema: torch.FunctionSchema, model: Callable[..., Any]) -> Callable[..., Any]:
    from tools.npu_standin.aten import mapped, onto_device, over, refuse_strangers

    def kernel(*args: Any, **kwargs: Any) -> Any:
        values = _filled(schema, args, kwargs)
        refuse_strangers(name, values)
        calls.note("vendor", name, values)
        return mapped(onto_device, model(**mapped(over, values)))

    return kernel


def _register(level: str, namespaces: Sequence[str]) -> None:
    """Put each model under its op, for tensors of the level's device."""
    key, kernel_of = ("CPU", _on_cpu) if level == "l2" else ("PrivateUse1", _on_device)
    libraries = {space: torch.library.Library(space, "IMPL") for space in namespaces}
    for name, model in models.load().items():
        space, _, op = name.partition("::")
        if space in libraries:
            libraries[space].impl(op, kernel_of(name, schemas.schema(name), model), key)
    _alive.extend(libraries.values())


def on_cpu(namespace: str) -> torch.library.Library:
    """Put the models of a namespace under its ops for CPU tensors; they leave when the result is destroyed."""
    library = torch.library.Library(namespace, "IMPL")
    for name, model in models.load().items():
        space, _, op = name.partition("::")
        if space == namespace:
            library.impl(op, _on_cpu(name, schemas.schema(name), model), "CPU")
    return library


def _load_wheel(node: Chip, lacking: Sequence[str]) -> None:
    from tools.npu_standin import cann, host

    host.load(cann.build(without=lacking), node)


def install(soc: str, level: str = "l2", *, packages: Sequence[str] = DEFAULT_PACKAGES, lacking: Sequence[str] = ()) -> StandIn:
    """Pretend that this process runs on a node with chip `soc` ("a2", "a3", "950" or a family name).

    l2: vendor ops work on CPU tensors. Where torch_npu is installed its schemas and Meta kernels are the wheel's own, else the vendored text
    is defined. l3: device "npu", torch_npu's own host code; needs the wheel, gcc and x86-64. `packages`: namespaces that exist beside
    torch_npu's. `lacking`: aclnn names that the pretended op package does not have although torch_npu calls them (l3). A second call may
    only change the chip, and that only at l2, where no host code asks for it.
    ValueError: unknown chip, level or package, or another installation before. StandInError: what level l3 needs is absent.
    """
    node = chip(soc)
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    if unknown := set(packages) - set(schemas.PACKAGES):
        raise ValueError(f"unknown packages {', '.join(sorted(unknown))}; known: {', '.join(schemas.PACKAGES)}")
    wanted = StandIn(node, level, tuple(sorted(packages)), has_wheel(), tuple(sorted(lacking)))
    if _installed:
        first = _installed[0]
        if wanted != (replace(first, chip=node) if level == "l2" else first):
            raise ValueError(f"this process already has {first}; {wanted} needs a process of its own")
        models.set_soc(node.family)
        return wanted
    models.set_soc(node.family)
    if wanted.wheel or level == "l3":
        _load_wheel(node, wanted.lacking)
    own = [] if wanted.wheel or level == "l3" else ["npu"]
    _alive.extend(schemas.define(space) for space in (*own, *packages))
    _register(level, packages if level == "l3" else ("npu", *packages))
    if functions.NAME in packages:
        functions.mount(level)
    if level == "l3":
        _answer_on_device()
    _installed.append(wanted)
    return wanted


def _answer_on_device() -> None:
    from tools.npu_standin import aclnn, aten

    aclnn.load()
    library, _ = aten.route()
    _alive.append(library)
