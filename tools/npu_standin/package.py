"""A pretended op package: its aclnn entries in a libcust_opapi.so, which torch_npu finds as it finds a real one.

Only the way into it is real; every call is answered by a bridge, as those of libopapi are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.npu_standin import cann, install, schemas
from tools.npu_standin.wheel import StandInError

OWN_KERNELS = ("aclnnV4HcHead",)
"""What the package that backends/ascend/csrc describes has."""
PATH = "ASCEND_CUSTOM_OPP_PATH"
_TRAMPOLINE = "trampoline_x86_64.S"
_LIBRARY = Path("op_api") / "lib" / "libcust_opapi.so"


def build(kernels: Collection[str] = OWN_KERNELS) -> Path:
    """Compile the package when it is not there yet; returns the directory for $ASCEND_CUSTOM_OPP_PATH. StandInError as for cann.build."""
    libraries = cann.build()
    known = hashlib.sha256("\0".join((libraries.name, Path(__file__).read_text(encoding="utf-8"), *sorted(kernels))).encode())
    target = cann.cache_directory() / f"npu_package-{known.hexdigest()[:16]}"
    if (target / _LIBRARY).is_file():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        where = Path(scratch)
        shutil.copy(cann.SOURCES / _TRAMPOLINE, where)
        names = [name + end for name in kernels for end in ("", cann.WORKSPACE)]
        (where / "entries.S").write_text(cann.entries(names), encoding="utf-8")
        built = where / "package"
        (built / _LIBRARY).parent.mkdir(parents=True)
        cann.gcc(
            "-shared", "-o", str(built / _LIBRARY), "entries.S", _TRAMPOLINE, str(libraries / "libopapi.so"), where=where
        )  # fmt: skip
        try:
            built.rename(target)
        except OSError:  # another process built the same meanwhile
            if not (target / _LIBRARY).is_file():
                raise
    return target


def show(kernels: Collection[str] = OWN_KERNELS) -> None:
    """Let this process find the package. StandInError when torch_npu has been imported: it looks for packages once."""
    if "torch_npu" in sys.modules:
        raise StandInError("torch_npu was imported before the pretended op package was there; show it first")
    os.environ[PATH] = os.pathsep.join(filter(None, (str(build(kernels)), os.environ.get(PATH))))


@contextmanager
def offered(namespace: str) -> Iterator[None]:
    """Inside the block the modelled ops of a namespace that no stand-in installs can be called on CPU tensors (level l2)."""
    kept = [schemas.define(namespace), install.on_cpu(namespace)]
    try:
        yield
    finally:
        for library in reversed(kept):
            library._destroy()
