"""Errors of the vendor's software that are no defect here: what a node lacks, told in one message."""

from __future__ import annotations

import re

from backends.ascend.probe import torch_npu_version

_NO_KERNEL = re.compile(r"(aclnn\w+) or \1GetWorkspaceSize not (?:in (\w+\.so)|found)")
_OLDER_WAY = re.compile(r"OpParamMaker\.cpp:\d+.*OPS function error: (\w+), error code is (\d+)")


def explain_failure(error: BaseException) -> str | None:
    """What to tell a user about an error raised by a vendor op, None for one that this backend does not recognise.

    Op names are looked up in CANN's libraries at the first call, so a missing op package is not seen before.
    """
    if older := _OLDER_WAY.search(str(error)):
        # some calls of torch_npu leave the aclnn way without a word when CANN lacks the name
        return (
            f"torch_npu {torch_npu_version()} ran {older[1]} as an operator of the older kind and that failed (code {older[2]}): most likely the "
            f"CANN of this node has no aclnn{older[1]}. Install the ops package of the CANN release that goes with it and source its set_env.sh "
            "(docs/ascend.md), or take the op from another backend with --ops OP=cpu"
        )
    if (found := _NO_KERNEL.search(str(error))) is None:
        return None
    # on 950, for which torch_npu has no operators of the older kind, it does not say where it looked
    name, searched = found[1], f" ({found[2]} was searched)" if found[2] else ""
    return (
        f"the CANN of this node has no {name}{searched}, which torch_npu {torch_npu_version()} calls: "
        "install the ops package of the CANN release that goes with it and source its set_env.sh (docs/ascend.md), "
        "or take the op from another backend with --ops OP=cpu"
    )
