"""Scores and choice of compressed positions."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import model, put
from tools.npu_standin.host import bridge


@bridge(
    "aclnnLightningIndexer",
    "query:t key:t weights:t actual_seq_lengths_query:t actual_seq_lengths_key:t block_table:t layout_query:s layout_key:s sparse_count:i"
    " sparse_mode:i pre_tokens:i next_tokens:i return_value:b indices:t values:t",
)
def lightning_indexer(indices: Tensor, values: Tensor, **arguments: object) -> None:
    """npu_lightning_indexer."""
    put(model("npu::npu_lightning_indexer")(**arguments), indices, values)
