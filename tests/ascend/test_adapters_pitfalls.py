"""Faults that were reported for this model on these chips, planted one by one at the calls of vendor ops: each must be seen.

Source: Ascend operator notes, section 10, and specification section 13. A fault counts as seen when the judge rejects the result, or when
the documented limits (or the vendor's model) refuse the call. The same call without the fault must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends.ascend import attention as attention_file
from backends.ascend import compress as compress_file
from backends.ascend import indexer as indexer_file
from backends.ascend.limits import LimitError, enforced
from ops.contract import CONTRACTS, Sample
from ops.judge import Verdict, judge
from ops.registry import on_device
from tests.ascend import wide
from tests.ascend.bound import binding_of

BF16 = torch.bfloat16
Change = Callable[[dict[str, Any]], dict[str, Any]]


class _Altered(TorchFunctionMode):
    """Calls of one vendor op with other arguments, as if the adapter had passed them so."""

    def __init__(self, op: str, change: Change) -> None:
        super().__init__()
        self.op, self.change, self.reached = op, change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "_qualified_op_name", "") == self.op:
            self.reached += 1
            kwargs = self.change(dict(kwargs))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Plant:
    """One fault: the contract, the vendor op whose call is changed, the change, the sample, the chips that have the op."""

    name: str
    op: str
    vendor: str
    change: Change
    sample: Callable[[], Sample]
    socs: tuple[str, ...] = ("910b", "910_93", "950")


def to(**values: Any) -> Change:
    return lambda kwargs: {**kwargs, **values}


def without(*names: str) -> Change:
    return lambda kwargs: {k: v for k, v in kwargs.items() if k not in names}


def through(name: str, f: Callable[[Tensor], Any]) -> Change:
    return lambda kwargs: {**kwargs, name: f(kwargs[name])}


def swapped(a: str, b: str) -> Change:
    return lambda kwargs: {**kwargs, a: kwargs[b], b: kwargs[a]}


def of(op: str, name: str) -> Callable[[], Sample]:
    return lambda: next(s for s in CONTRACTS[op].samples(BF16, 0) if s.name == name)


def attention(lengths: wide.Lengths, **options: Any) -> Callable[[], Sample]:
    return lambda: wide.attention(BF16, torch.Generator().manual_seed(1), lengths, **options)


def compress(index: int, hidden: int = 4096) -> Callable[[], Sample]:
    return lambda: list(wide.compress_samples(BF16, hidden))[index]


def moe_clamped() -> Sample:
    return next(s for s in CONTRACTS["moe_mlp"].samples(BF16, 0) if s.name == "many")


def int8_experts() -> Sample:
    return next(s for s in CONTRACTS["grouped_experts_int8"].samples(BF16, 0) if s.name == "outliers")


def integer_table() -> Sample:
    return next(s for s in CONTRACTS["gate_hash"].samples(BF16, 0) if s.args[2].dtype == torch.int32 and s.args[0].shape[0] > 1)


CLAMP_QUANT, FINALIZE = "custom::npu_dequant_swiglu_clamp_quant", "npu::npu_moe_finalize_routing"
SHAREDKV, COMPRESSOR, GATING = "custom::npu_sparse_attn_sharedkv", "custom::compressor", "npu::npu_moe_gating_top_k"
OLDER = ("910b", "910_93")
DECODE: wide.Lengths = [(300, 1), (126, 2)]
PLANTS = [
    # vllm-ascend 14363, 11184: the clamp is not handed on
    Plant("clamp_of_routed_experts_lost", "moe_mlp", "npu::npu_clipped_swiglu", to(limit=1e30), moe_clamped, OLDER),
    Plant("clamp_left_to_the_vendors_default", "moe_mlp", "npu::npu_clipped_swiglu", without("limit"), moe_clamped, OLDER),
    Plant("clamp_of_shared_expert_lost", "clamped_swiglu", "npu::npu_clipped_swiglu", to(limit=1e30), of("clamped_swiglu", "flash"), OLDER),
    Plant("alpha_of_another_model", "clamped_swiglu", "npu::npu_clipped_swiglu", without("alpha"), of("clamped_swiglu", "flash"), OLDER),
    Plant("bias_of_another_model", "clamped_swiglu", "npu::npu_clipped_swiglu", without("bias"), of("clamped_swiglu", "flash"), OLDER),
    Plant("interleaved_halves", "clamped_swiglu", "npu::npu_clipped_swiglu", without("interleaved"), of("clamped_swiglu", "flash"), OLDER),
    Plant("up_half_first", "grouped_experts_int8", CLAMP_QUANT, to(activate_left=False), of("grouped_experts_int8", "flash"), OLDER),
    Plant("swiglu_mode_of_plain_swiglu", "grouped_experts_int8", CLAMP_QUANT, to(swiglu_mode=0), int8_experts, OLDER),
    Plant("clamp_of_another_model", "moe_int8", CLAMP_QUANT, without("clamp_limit"), of("moe_int8", "clamp"), OLDER),
    Plant("row_index_by_columns", "moe_int8", FINALIZE, to(drop_pad_mode=0), of("moe_int8", "many"), OLDER),
    Plant("shared_expert_lost", "moe_int8", FINALIZE, to(skip1=None), of("moe_int8", "many"), OLDER),
    Plant("routed_codes_without_their_scales", "moe_int8", "npu::npu_moe_init_routing_v2", to(scale=None), of("moe_int8", "many"), OLDER),
    Plant("clamp_dropped_on_950", "moe_mx", "custom::npu_swiglu_group_quant", to(clamp_limit=None), of("moe_mx", "clamp"), ("950",)),
    Plant("scales_rounded_down", "moe_mx", "npu::npu_dynamic_mx_quant", to(scale_alg=0), of("moe_mx", "below-power"), ("950",)),
    Plant("fp4_by_default", "quant_mxfp8", "npu::npu_dynamic_mx_quant", without("dst_type"), of("quant_mxfp8", "flash-unit"), ("950",)),
    Plant("norm_scales_rounded_down", "rms_norm_quant", "npu::npu_rms_norm_dynamic_mx_quant", to(scale_alg=0), of("rms_norm_quant", "flash-unit-mx"),
          ("950",)),
    Plant("norm_without_its_weight", "rms_norm_quant", "custom::npu_rms_norm_dynamic_quant", through("gamma", torch.ones_like),
          of("rms_norm_quant", "flash-unit-int8"), OLDER),
    Plant("product_in_hf32", "hc_pre", "npu::npu_mhc_pre", to(inner_precise=1), of("hc_pre", "flash-unit"), ("950",)),
    Plant("counts_read_as_cumulative", "moe_mlp", "npu::npu_grouped_matmul", without("group_list_type"), moe_clamped),
    Plant("group_type_missing", "moe_mlp", "npu::npu_grouped_matmul", without("group_type"), moe_clamped),
    Plant("cumulative_counts_asked_for", "moe_dispatch", "npu::npu_moe_init_routing_v2", to(expert_tokens_num_type=0), of("moe_dispatch", "many")),
    Plant("row_index_of_the_other_direction", "moe_dispatch", "npu::npu_moe_init_routing_v2", to(row_idx_type=0), of("moe_dispatch", "many")),
    # GDzhu01 76: without seqused a template misplaces rows for H = 7168
    Plant("seqused_left_null", "compress", COMPRESSOR, without("seqused"), compress(1, 7168)),
    Plant("overlap_state_not_saved", "compress", COMPRESSOR, through("state_block_table", torch.zeros_like), compress(7)),
    Plant("start_pos_lost", "compress", COMPRESSOR, to(start_pos=None), compress(7)),
    Plant("sine_and_cosine_swapped", "compress", COMPRESSOR, swapped("rope_sin", "rope_cos"), compress(5)),
    Plant("halves_instead_of_pairs", "compress", COMPRESSOR, to(rotary_mode=1), compress(5)),
    Plant("coff_of_hca", "compress", COMPRESSOR, to(coff=1), compress(5)),
    Plant("table_of_one_row_per_entry_short", "compress", COMPRESSOR, lambda k: {**k, **{n: k[n][:1] for n in ("rope_sin", "rope_cos")}}, compress(5)),
    Plant("softmax_scale_left_at_zero", "sparse_attention", SHAREDKV, without("softmax_scale"), attention(DECODE)),
    Plant("window_one_too_wide", "sparse_attention", SHAREDKV, to(ori_win_left=128), attention(DECODE)),
    Plant("window_without_mask", "sparse_attention", SHAREDKV, to(ori_mask_mode=0), attention(DECODE)),
    Plant("sinks_lost", "sparse_attention", SHAREDKV, to(sinks=None), attention(DECODE)),
    Plant("sinks_scaled", "sparse_attention", SHAREDKV, through("sinks", lambda s: s * 512**-0.5), attention(DECODE)),
    Plant("metadata_missing", "sparse_attention", SHAREDKV, to(metadata=None), attention(DECODE)),
    Plant("compressed_lengths_for_uncompressed", "sparse_attention", SHAREDKV, through("seqused_kv", lambda t: t // 4),
          attention(DECODE, ratio=4, topk=512)),
    Plant("choices_ignored", "sparse_attention", SHAREDKV, to(cmp_sparse_indices=None), attention([(2600, 2)], ratio=4, topk=512)),
    Plant("entries_of_the_future", "sparse_attention", SHAREDKV, to(cmp_mask_mode=0), attention([(250, 10)], ratio=128)),
    Plant("ratio_of_another_layer", "sparse_attention", SHAREDKV, to(cmp_ratio=4), attention([(250, 10)], ratio=128)),
    Plant("softmax_instead_of_sqrt_softplus", "gate_topk", GATING, to(norm_type=0), of("gate_topk", "flash")),
    Plant("routed_scaling_factor_lost", "gate_topk", GATING, without("routed_scaling_factor"), of("gate_topk", "flash")),
    Plant("bias_not_used_for_the_choice", "gate_topk", GATING, to(bias=None), of("gate_topk", "many")),
    Plant("weights_in_bf16", "gate_topk", GATING, through("x", lambda x: x.bfloat16().float()), of("gate_topk", "flash")),
    Plant("hash_table_not_passed", "gate_hash", GATING, to(tid2eid=None, input_ids=None), integer_table),
    Plant("token_ids_through_a_narrow_type", "gate_hash", GATING, through("input_ids", lambda t: (t % 3).long()), integer_table),
    Plant("rotation_of_halves", "rope", "custom::inplace_partial_rotary_mul", to(rotary_mode="half"), of("rope", "flash-unit")),
    Plant("nothing_rotated", "rope", "custom::inplace_partial_rotary_mul", to(partial_slice=[0, 0]), of("rope", "flash-unit")),
    Plant("angles_not_repeated_in_pairs", "rope", "custom::inplace_partial_rotary_mul",
          through("r1", lambda c: torch.cat((c[..., ::2], c[..., ::2]), -1)), of("rope", "flash-unit")),
    Plant("inverse_rotation_forwards", "rope", "custom::inplace_partial_rotary_mul", through("r2", torch.neg), of("rope", "flash-unit-inverse")),
    Plant("streams_mixed_over_the_other_index", "hc_post", "custom::npu_hc_post", through("comb", lambda c: c.transpose(1, 2).contiguous()),
          of("hc_post", "flash-unit")),
    Plant("epsilon_of_the_default", "hc_pre", "custom::npu_hc_pre_sinkhorn", without("hc_eps"), of("hc_pre", "flash-unit"), ("910_93",)),
    Plant("negative_slots_written", "cache_insert", "custom::scatter_nd_update_asc", through("indices", lambda i: i.abs()),
          of("cache_insert", "odd-512"), OLDER),
    Plant("negative_slots_left_to_the_wheel", "cache_insert", "npu::npu_scatter_nd_update_", through("indices", lambda i: i.masked_fill(i == 0, -1)),
          of("cache_insert", "odd-512"), ("950",)),
    # GDzhu01 91: addresses through fp32 lose the last bit above 2^24
    Plant("addresses_through_fp32", "cache_insert", "custom::scatter_nd_update_asc", through("indices", lambda i: i.float().long()),
          lambda: high_slots(), OLDER),
    Plant("int8_sums_scaled_by_default_output", "linear_int8", "npu::npu_quant_matmul", without("output_dtype"), of("linear_int8", "flash-unit")),
    Plant("scale_per_token_lost", "linear_int8", "npu::npu_quant_matmul", to(pertoken_scale=None), of("linear_int8", "flash-unit")),
    Plant("mx_scales_read_as_fp32", "linear_mx", "npu::npu_quant_matmul", without("scale_dtype"), of("linear_mx", "flash-unit"), ("950",)),
    Plant("scales_read_as_fp32", "linear_fp8", "npu::npu_quant_matmul", without("scale_dtype"), of("linear_fp8", "flash-unit"), ("950",)),
    Plant("groups_lost", "linear_fp8", "npu::npu_quant_matmul", without("group_sizes"), of("linear_fp8", "flash-unit"), ("950",)),
]  # fmt: skip


def high_slots() -> Sample:
    """A cache of more than 2^24 rows, written at odd rows beyond that."""
    first = 2**24
    cache = torch.zeros(first // 128 + 2, 128, 1, dtype=BF16)
    slots = torch.tensor([first + 1, first + 3, first + 127, 5])
    return Sample("high", (cache, torch.arange(1, 5)[:, None].to(BF16), slots))


def judged(plant: Plant, soc: str, device: torch.device) -> tuple[Verdict, int]:
    binding = binding_of(soc, BF16, plant.op)
    sample = plant.sample()
    contract, fn = CONTRACTS[plant.op], getattr(binding.ops, plant.op)
    fn = fn if device.type == "cpu" else on_device(fn, contract, device)
    mode = _Altered(plant.vendor, plant.change)
    with enforced(soc), mode:
        return judge(contract, fn, sample), mode.reached


@pytest.fixture(autouse=True)
def _metadata_made_anew() -> Iterator[None]:
    """Metadata is kept between calls of equal lengths: a fault in one test must not meet what another one made."""
    with fresh_metadata():
        yield


@contextmanager
def fresh_metadata() -> Iterator[None]:
    for kept in (attention_file._metadata, indexer_file._metadata):
        kept._found.clear()
    yield
    for kept in (attention_file._metadata, indexer_file._metadata):
        kept._found.clear()


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.name)
def test_planted_fault_is_seen(plant: Plant, soc: str, device: torch.device) -> None:
    if soc not in plant.socs:
        pytest.skip(f"{plant.vendor} does not serve {plant.op} on {soc}")
    clean, reached = judged(Plant(plant.name, plant.op, plant.vendor, dict, plant.sample), soc, device)
    assert reached, f"the sample of {plant.name} does not reach {plant.vendor}"
    assert clean.ok, str(clean)
    try:
        verdict, _ = judged(plant, soc, device)
    except (LimitError, RuntimeError):
        return
    assert not verdict.ok


def test_the_clamp_lost_on_950_shows_in_the_numbers_too(soc: str, device: torch.device) -> None:
    """Without the limits in the way: the older kernel, reached by a missing activate_dim, gives other results."""
    if soc != "950":
        pytest.skip("the older kernel is reached on 950 only")
    plant = next(p for p in PLANTS if p.name == "clamp_dropped_on_950")
    fn = getattr(binding_of(soc, BF16, plant.op).ops, plant.op)
    fn = fn if device.type == "cpu" else on_device(fn, CONTRACTS[plant.op], device)
    with _Altered(plant.vendor, plant.change):
        assert not judge(CONTRACTS[plant.op], fn, plant.sample()).ok


@pytest.mark.parametrize("op", ["sparse_attention", "index_topk"])
def test_block_numbers_beyond_29077(op: str, soc: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend 16870: 32-bit addresses overflow from block 29,077 on."""
    contract = CONTRACTS[op]
    sample = high_blocks(op)
    assert int(sample.args[3 if op == "index_topk" else 2].max()) > 29_077
    binding = binding_of(soc, BF16, op)
    assert not binding.impl_of(op, sample.args, sample.kwargs).label.startswith("plain")
    fn = getattr(binding.ops, op) if device.type == "cpu" else on_device(getattr(binding.ops, op), contract, device)
    verdict = judge(contract, fn, sample)
    assert verdict.ok, str(verdict)
    wrapped = compress_file.Lengths.there
    monkeypatch.setattr(compress_file.Lengths, "there", lambda self, name, table: wrapped(self, name, table % 29_077))
    assert not judge(contract, fn, sample).ok


def high_blocks(op: str) -> Sample:
    g = torch.Generator().manual_seed(3)
    if op == "sparse_attention":
        return wide.attention(BF16, g, [(40, 2)], block_rows=16, spare_blocks=29_100)
    sample = list(wide.index_samples(BF16, 512))[1]
    q, w, keys, table, *rest = sample.args
    # 128 rows a block would take 950 MB: the same rows in blocks of 16
    rows = keys.view(keys.shape[0] * 8, 16, -1)
    fine = (table[:, :, None] * 8 + torch.arange(8)).flatten(1).int()
    fine = torch.where(table.repeat_interleave(8, 1) > 0, fine, 0).int()
    spare = 29_100
    keys = torch.cat((rows[:8], torch.full((spare, 16, 128), 999.0, dtype=BF16), rows[8:]))
    return Sample("high", (q, w, keys, torch.where(fine > 0, fine + spare, fine).int(), *rest), sample.kwargs)


def test_wo_a_of_pro_leaves_the_transposed_product(soc: str) -> None:
    """K times groups is 65536 for Pro: outside the documented limit of npu_transpose_batchmatmul."""
    binding = binding_of(soc, BF16, "grouped_linear")
    labels = {n: binding.impl_of("grouped_linear", *_call(wide.grouped_linear_sample(BF16, n))).label for n in (8, 16)}
    assert labels == {8: "npu_transpose_batchmatmul", 16: "torch.matmul"}
    x, w = wide.grouped_linear_sample(BF16, 16).args
    impl = next(i for i in CONTRACTS["grouped_linear"].candidates("ascend") if i.name == "npu_transpose_batchmatmul")
    with pytest.raises(LimitError, match="65536"), enforced(soc):
        impl.fn(x, w)


def _call(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return sample.args, dict(sample.kwargs)


def test_no_adapter_names_the_quantised_transposed_product() -> None:
    """Its precision on 950 is in doubt (GDzhu01 108): the output projection stays a bf16 product."""
    folder = __import__("pathlib").Path(attention_file.__file__).parent
    named = [p.name for p in folder.glob("*.py") if "npu_transpose_quant_batchmatmul" in p.read_text(encoding="utf-8")]
    assert not named
