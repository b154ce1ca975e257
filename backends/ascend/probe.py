"""What this machine offers an Ascend backend: chip, packages, and which vendor ops are registered."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from backends.ascend import own
from backends.ascend.chips import ALIASES, SOCS, family
from ops.probe import Probe

INSTALL = {
    "npu": "torch_npu of torch's own minor version, with a CANN toolkit and its ops package",
    "custom": "the custom_ops package of cann-recipes-infer (both of its .run files)",
    "cann_ops_transformer": "the cann-ops-transformer package, with the ops of CANN 9.1 or newer",
    "_C_ascend": "vllm-ascend, which brings its own op package",
    own.NAMESPACE: "both halves of this project's own ops (docs/ascend.md)",
}
"""Namespace of vendor ops -> what brings it."""

EXTENSIONS = ("custom_ops", "cann_ops_transformer")
"""Packages that register ops when they are imported."""

_CORE = "npu::npu_rms_norm"


def unavailable() -> str | None:
    """Why nothing can run here, or None: torch_npu absent, not loadable or of another torch, no device, or a chip that is not known."""
    if registered(_CORE) and torch_npu_version() is None:
        return _unknown_chip()
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install torch_npu, of the same minor version as torch)"
    if why := _other_torch():
        return why
    if why := _load_failure():
        return why
    if not _runtime().device_count():
        return "torch_npu sees no device (npu-smi info lists them; ASCEND_RT_VISIBLE_DEVICES may hide them)"
    return _unknown_chip()


def torch_npu_version() -> str | None:
    """Version of the installed torch_npu, None when absent; nothing is imported."""
    try:
        return version("torch_npu")
    except PackageNotFoundError:
        return None


def _runtime() -> Any:
    return importlib.import_module("torch_npu").npu


def _minor(text: str) -> str:
    return ".".join(text.split("+")[0].split(".")[:2])


def _other_torch() -> str | None:
    found = torch_npu_version()
    if found is None or _minor(found) == _minor(torch.__version__):
        return None
    minor = _minor(torch.__version__)
    return f"torch_npu {found} does not go with torch {torch.__version__}: both need one minor version (pip install torch_npu=={minor}.*)"


@functools.cache
def _load_failure() -> str | None:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"torch_npu {torch_npu_version()} can not be imported: {first}; is a CANN toolkit installed and its set_env.sh sourced?"
    for package in EXTENSIONS:
        # absent ones are told per op by what is missing; one that is there and does not load is worth a message
        if importlib.util.find_spec(package) is None:
            continue
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{package} is installed but can not be imported: {str(error).strip()}; source the set_env.bash of its op package, or remove it"
    return None


def _unknown_chip() -> str | None:
    try:
        _soc()
    except ValueError as error:
        return str(error)
    return None


def registered(name: str) -> bool:
    """Whether a vendor op can be called: "npu::npu_rms_norm", or "npu::npu_moe_gating_top_k(tid2eid)" to ask for an argument.

    Names with a dot are Python functions of a package, for instance "cann_ops_transformer.lightning_indexer".
    """
    op, _, argument = name.rstrip(")").partition("(")
    namespace, _, plain = op.partition("::")
    if not plain:
        package, _, function = op.partition(".")
        return python_function(package, function) is not None
    if namespace == own.NAMESPACE and own.missing(plain):
        return False
    try:
        packet = getattr(getattr(torch.ops, namespace), plain)
    except AttributeError:
        return False
    return not argument or any(a.name == argument for a in packet.default._schema.arguments)


def python_function(package: str, function: str) -> object | None:
    """A function of a vendor package that has no dispatcher schema, None where package or function is absent."""
    if importlib.util.find_spec(package) is None:
        return None
    found: object | None = getattr(getattr(importlib.import_module(package), "ops", None), function, None)
    return found


def _hint(gone: Sequence[str]) -> str:
    spaces = dict.fromkeys(name.replace(".", "::").partition("::")[0] for name in gone)
    needed = "; ".join(f"install {INSTALL[s]}" for s in spaces if s in INSTALL)
    ours = [name.partition("::")[2] for name in gone if name.startswith(f"{own.NAMESPACE}::")]
    needed += "".join(f": {why}" for why in dict.fromkeys(own.missing(op) for op in ours) if why)
    return f"{needed}; found torch_npu {torch_npu_version() or 'absent'}, torch {torch.__version__}"


def _soc() -> str | None:
    if chosen := os.environ.get("V4_ASCEND_SOC"):
        soc = ALIASES.get(chosen, chosen)
        if soc not in SOCS:
            raise ValueError(f"V4_ASCEND_SOC: found {chosen!r}, expected one of {', '.join([*SOCS, *ALIASES])}")
        return soc
    if torch_npu_version() is None:
        return None
    return family(_runtime().get_device_name(0))


def device_type() -> str:
    """The device on which the vendor's ops have kernels: "npu", or "cpu" where they were registered for CPU tensors.

    V4_ASCEND_DEVICE chooses when there are both. ValueError for another name.
    """
    chosen = os.environ.get("V4_ASCEND_DEVICE")
    if chosen not in (None, "npu", "cpu"):
        raise ValueError(f"V4_ASCEND_DEVICE: found {chosen!r}, expected npu or cpu")
    return chosen or ("npu" if torch_npu_version() is not None else "cpu")


def probe() -> Probe:
    """Chip, versions and registered vendor ops. Without torch_npu a probe that has nothing, and says what to install.

    V4_ASCEND_SOC names another chip than the one found. Where there is a device, one setting is switched for the process, since the
    contracts ask for it: products of fp32 matrices are not computed in HF32.
    """
    found = {"torch": torch.__version__, "torch_npu": torch_npu_version() or "absent"}
    if unavailable() is not None:
        return Probe(device="npu", soc=None, versions=found, ask=lambda name: False, hint=_hint)
    if torch_npu_version() is not None:
        _runtime().matmul.allow_hf32 = False
        found["device"] = _runtime().get_device_name(0)
    return Probe(device=device_type(), soc=_soc(), versions=found, ask=registered, hint=_hint)


def memory_available() -> int | None:
    """Free bytes on the current device, or None where it does not say."""
    if device_type() == "cpu":
        return None
    free, _ = _runtime().mem_get_info()
    return int(free)
