"""Plain torch on the device for every op, and why an op has nothing else, or what sends a call there.

The reasons are data, so that a table of what serves each op can be printed and tested without a device.
"""

from __future__ import annotations

from ops.contract import CONTRACTS

PLAIN = "plain torch"

REASONS = {
    "add_rms_norm": "the graph does not call it",
    "all_gather": "torch.distributed, backend hccl",
    "all_reduce": "torch.distributed, backend hccl",
    "all_to_all": "torch.distributed, backend hccl",
    "argmax": "torch's own op is the vendor's",
    "cache_insert_fp8": "kv_compress_epilog puts scales behind each row, the contract behind each block",
    "dequant_fp8": "npu_anti_mx_quant has blocks of 32 on 950 only",
    "dequant_fp8_block": "no op dequantises 128 x 128 blocks of E8M0 scales",
    "dequant_int8": "a cast and a product",
    "dequant_mxfp4": "no exact form documented for A2 and A3",
    "grouped_experts_fp8": "no mode has FP8 experts: the hub's are FP4, converted ones INT8",
    "hadamard": "no op; a product with a constant matrix",
    "index_insert_fp4": "the vendor's epilogue has another layout of scales",
    "index_insert_fp8": "indexer_compress_epilog keeps scales in a tensor of their own",
    "linear": "torch's matmul is the vendor's",
    "linear_fp4": "the graph does not call it",
    "quant_fp8": "npu_dynamic_block_quant gives scales that are no powers of two",
    "quant_mxfp4": "what npu_dynamic_mx_quant makes of zero and tiny blocks is not documented, and every bit is defined",
    "roundtrip_fp4": "no op on A2 and A3; quantise and dequantise otherwise",
    "roundtrip_fp8": "no op on A2 and A3; quantise and dequantise otherwise",
    "sample": "torch's own ops",
}
"""Op -> why plain torch serves it alone."""


def register() -> None:
    """Offer plain torch for every op of the cpu backend that is not composed of parts, behind what the files of this package offer."""
    for contract in CONTRACTS.values():
        plain = contract.impls.get("cpu")
        if plain is None or contract.parts:
            continue
        reason = REASONS.get(contract.name)
        contract.implement("ascend", note=PLAIN if reason is None else f"{PLAIN}: {reason}")(plain.fn)
