"""Models of the compressor, the indexers, the attentions and the scatter ops against the contracts' references, and the traps they carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ops.attention import sparse_attention
from ops.compress import compress
from ops.indexer import index_scores_reference
from tests.ascend import model_cases_paged as cases
from tests.ascend.model_cases import arguments, call
from tests.ascend.model_checks import near, poisoned
from tools.npu_standin import models

pytestmark = pytest.mark.standin

MODELS = models.load()
COMPRESSOR, SHAREDKV, FLASH = "custom::compressor", "custom::npu_sparse_attn_sharedkv", "cann_ops_transformer::sparse_flash_mla"
KINDS = [(2, 4, 512), (2, 4, 128), (1, 128, 512)]


def _golden(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and state in float64 by the contract."""
    cos, sin = given["rope_cos"][:, ::2].double(), given["rope_sin"][:, ::2].double()
    state = given["state_cache"].double().clone()
    weights = (given[k].double() for k in ("wkv", "wgate", "ape", "norm_weight"))
    entries = compress.reference(
        given["x"].double(), *weights, cos, sin, state, given["state_block_table"], given["cu_seqlens"], given["start_pos"],
        ratio=given["cmp_ratio"], eps=1e-6, compute=torch.float64,
    )  # fmt: skip
    return entries, state


@pytest.mark.parametrize("kind", KINDS)
def test_compressor(kind):
    given = arguments(COMPRESSOR) if kind == KINDS[0] else cases.compressor(torch.Generator().manual_seed(1), *kind)
    entries, state = _golden(given)
    found = MODELS[COMPRESSOR](**given)
    ends, counts, m = cases.ENDS, cases.COUNTS, kind[1]
    made = sum(e // m - (e - n) // m for e, n in zip(ends, counts, strict=True))
    near(found[:made], entries[:made], 2)
    assert found[made:].numel() == 0 or poisoned(found[made:])
    assert float((given["state_cache"].double() - state).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [3, 4, 5, 127, 128, 129, 130])
def test_compressor_in_chunks_is_compressor_at_once(kind, prompt):
    coff, ratio, width = kind
    g = torch.Generator().manual_seed(prompt)
    start = cases.compressor(g, coff, ratio, width)
    x, theta = torch.randn(prompt, 1024, generator=g).bfloat16(), torch.randn(prompt, 32, generator=g).repeat_interleave(2, 1)
    table = torch.arange(1, 21, dtype=torch.int32)[None]
    state = torch.zeros(21, 16, 2 * coff * width)

    def run(first: int, end: int, cache: torch.Tensor) -> torch.Tensor:
        n, before = end - first, first // ratio
        rows = min(n, n // ratio + 1)
        turn = torch.zeros(rows, 64)
        made = end // ratio - before
        turn[:made] = theta[before : before + made]
        given = {
            **start,
            "x": x[first:end],
            "rope_cos": turn.cos(),
            "rope_sin": turn.sin(),
            "state_cache": cache,
            "state_block_table": table,
        }
        given |= {"cu_seqlens": cases.ints(0, n), "seqused": cases.ints(n), "start_pos": cases.ints(first)}
        return MODELS[COMPRESSOR](**given)[:made]

    whole, parts = state.clone(), state.clone()
    at_once = run(0, prompt, whole)
    cuts = sorted({0, min(2, prompt), min(3, prompt), prompt // 2, prompt - 1, prompt})
    chunks = torch.cat([run(a, b, parts) for a, b in zip(cuts, cuts[1:], strict=False) if b > a])
    assert at_once.shape[0] == prompt // ratio
    near(chunks, at_once.double(), 3)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_compressor_does_not_write_block_0_and_will_not_read_it():
    given = arguments(COMPRESSOR)
    given["state_block_table"][2] = 0
    before = given["state_cache"].clone()
    MODELS[COMPRESSOR](**given)
    assert torch.equal(given["state_cache"][0], before[0])
    given["state_block_table"][0] = 0
    with pytest.raises(models.Refused, match="block 0 is reserved"):
        MODELS[COMPRESSOR](**given)


def test_compressor_takes_sines_first():
    given = arguments(COMPRESSOR)
    right = MODELS[COMPRESSOR](**given)[:2]
    swapped = call(COMPRESSOR, rope_sin=given["rope_cos"], rope_cos=given["rope_sin"])[:2]
    assert torch.equal(right[:, :448], swapped[:, :448])
    assert not torch.allclose(right[:, 448:].float(), swapped[:, 448:].float(), atol=0.1)


def test_compressor_skips_padding_by_seqused():
    """Tokens behind seqused are neither pooled nor stored."""
    given = arguments(COMPRESSOR)
    short = call(COMPRESSOR, seqused=cases.ints(3, 1, 4), state_cache=given["state_cache"])
    assert poisoned(short[2:]) and not poisoned(short[:2])
    with pytest.raises(models.Refused, match="at most the lengths"):
        call(COMPRESSOR, seqused=cases.ints(6, 1, 4))


def _as_contract(given: dict[str, Any], lengths: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call as arguments of the contract, in float64."""
    chosen, cmp = given["cmp_sparse_indices"], given["cmp_kv"]
    args = (
        given["q"].double(), given["ori_kv"][:, :, 0].double(), given["ori_block_table"], given["sinks"].double(), given["cu_seqlens_q"],
        given[lengths] - given["cu_seqlens_q"].diff(),
    )  # fmt: skip
    return args, {
        "scale": given["softmax_scale"], "window": given["ori_win_left"] + 1, "cmp_cache": None if cmp is None else cmp[:, :, 0].double(),
        "cmp_table": given["cmp_block_table"], "cmp_index": None if chosen is None else chosen[:, 0], "ratio": given["cmp_ratio"],
    }  # fmt: skip


def _attends(out: torch.Tensor, given: dict[str, Any], lengths: str) -> None:
    """Inside the bound of the contract for bf16."""
    args, kwargs = _as_contract(given, lengths)
    golden = sparse_attention.reference(*args, **kwargs, compute=torch.float64)
    (allowed,) = sparse_attention.bound(given["q"], *args[1:], **kwargs, golden=(golden,), found=(out,))
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - golden).abs() <= 2**-8 * golden.abs() + allowed).all())


LAYERS = {"SWA": {"cmp": False}, "CSA": {"ratio": 4}, "HCA": {"indices": False, "ratio": 128}}


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_sharedkv_attention(layer):
    given = cases.with_metadata(cases.sharedkv(torch.Generator().manual_seed(3), **LAYERS[layer]))
    out, lse = MODELS[SHAREDKV](**given)
    _attends(out, given, "seqused_kv")
    assert lse.shape == (0,)


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_flash_mla_attention(layer):
    given = cases.flash_mla(torch.Generator().manual_seed(4), **LAYERS[layer])
    _attends(MODELS[FLASH](**given)[0], given, "seqused_ori_kv")


def test_attention_over_packed_rows(on_chip):
    on_chip("950")
    name = "custom::npu_kv_quant_sparse_attn_sharedkv"
    given = arguments(name)

    def values(packed: torch.Tensor) -> torch.Tensor:
        rows = packed.view(-1, 640)
        scale = rows[:, 576:590].contiguous().view(torch.bfloat16).double().repeat_interleave(64, 1)
        nope = rows[:, :448].contiguous().view(torch.float8_e4m3fn).double() * scale
        return torch.cat((nope, rows[:, 448:576].contiguous().view(torch.bfloat16).double()), 1).view(*packed.shape[:3], 512)

    plain = {**given, "ori_kv": values(given["ori_kv"]), "cmp_kv": values(given["cmp_kv"])}
    _attends(MODELS[name](**given)[0], plain, "seqused_kv")


def test_attention_with_the_default_scale_is_an_average():
    """softmax_scale 0, the default, is passed through as zero."""
    given = arguments(SHAREDKV)
    given.pop("softmax_scale")
    _attends(MODELS[SHAREDKV](**given)[0], {**given, "softmax_scale": 0.0}, "seqused_kv")


def test_attention_window_of_127_to_the_left_is_128_tokens():
    given = arguments(SHAREDKV)
    table = given["ori_block_table"]
    at = 256 - 1 - 127
    given["ori_kv"][int(table[1, at // 16]), at % 16] = 100.0
    inside = MODELS[SHAREDKV](**given)[0][5]
    given["ori_kv"][int(table[1, (at - 1) // 16]), (at - 1) % 16] = 1e4
    assert torch.equal(MODELS[SHAREDKV](**given)[0][5], inside)
    given["ori_kv"][int(table[1, at // 16]), at % 16] = 0.0
    assert not torch.equal(MODELS[SHAREDKV](**given)[0][5], inside)


def test_attention_ignores_entries_that_are_not_complete():
    given = arguments(SHAREDKV)
    before = MODELS[SHAREDKV](**given)[0]
    given["cmp_sparse_indices"][:, 0, 100] = 80  # complete for no query: the longest request has 64
    assert torch.equal(MODELS[SHAREDKV](**given)[0], before)


@pytest.mark.parametrize(
    "name,change,what",
    [
        (SHAREDKV, {"seqused_kv": cases.ints(9, 257, 4)}, "seqused_kv"),
        (SHAREDKV, {"cmp_ratio": 128}, "cmp_ratio"),
        (SHAREDKV, {"ori_win_left": 128}, "window"),
        (SHAREDKV, {"cmp_sparse_indices": None}, "cmp_topk"),
        (FLASH, {"ori_win_left": 128}, "window"),
        ("custom::npu_quant_lightning_indexer", {"actual_seq_lengths_key": cases.ints(9, 257, 4)}, "actual_seq_lengths_key"),
        ("custom::npu_quant_lightning_indexer", {"sparse_count": 1024}, "sparse_count"),
        ("cann_ops_transformer.lightning_indexer", {"topk": 1024}, "topk"),
    ],
)
def test_metadata_of_another_call_is_refused(name, change, what):
    with pytest.raises(models.Refused, match=f"metadata of another call: here .*{what}"):
        call(name, **change)


def test_metadata_defaults_differ_from_the_main_ops():
    """layout_key of the metadata op is BSND by default, PA_BSND in the indexer; cmp_ratio is -1 in one attention op and 0 in the other."""
    given = arguments("custom::npu_quant_lightning_indexer")
    about = arguments("custom::npu_quant_lightning_indexer_metadata")
    about.pop("layout_key")
    with pytest.raises(models.Refused, match="layout_query and layout_key"):
        call("custom::npu_quant_lightning_indexer", metadata=MODELS["custom::npu_quant_lightning_indexer_metadata"](**about))
    assert given["layout_key"] == "PA_BSND"


def test_compressed_lengths_that_contradict_are_refused():
    with pytest.raises(models.Refused, match="seqused_cmp_kv"):
        call(FLASH, seqused_cmp_kv=cases.ints(9, 256, 4))
    with pytest.raises(models.Refused, match="cmp_residual_kv"):
        call(FLASH, cmp_residual_kv=cases.ints(0, 0, 0))


def _scores(q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    starts = cases.ints(*(e - n for e, n in zip(cases.ENDS, cases.COUNTS, strict=True)))
    return index_scores_reference(q, w, keys, table, cases.ints(0, *cases.CUMULATIVE), starts, ratio=4, compute=torch.float64)[0]


def _is_top(chosen: torch.Tensor, scores: torch.Tensor, k: int) -> None:
    """Every row holds the k best finite scores, best first, then -1."""
    for row, score in zip(chosen, scores, strict=True):
        found = row[row >= 0].long()
        visible = int(score.isfinite().sum())
        assert found.numel() == min(k, visible) and bool((row[found.numel() :] == -1).all())
        best = score[:visible].sort(descending=True).values[: found.numel()]
        assert torch.allclose(score[found], best, rtol=1e-5, atol=1e-5 * float(score[:visible].abs().max()) if visible else 0)


@pytest.mark.parametrize("k", [1, 7, 512])
def test_quantised_indexer(k):
    given = arguments("custom::npu_quant_lightning_indexer")
    about = arguments("custom::npu_quant_lightning_indexer_metadata", sparse_count=k)
    metadata = MODELS["custom::npu_quant_lightning_indexer_metadata"](**about)
    found, values = call("custom::npu_quant_lightning_indexer", sparse_count=k, metadata=metadata)
    q, keys = given["query"].double() * given["query_dequant_scale"].double()[..., None], given["key"][:, :, 0].double()
    _is_top(
        found[:, 0], _scores(q, given["weights"].double(), keys * given["key_dequant_scale"].double(), given["block_table"]), k
    )
    assert values.shape == (0,)


def test_cann_indexer():
    given = arguments("cann_ops_transformer.lightning_indexer")
    found, _ = call("cann_ops_transformer.lightning_indexer")
    _is_top(
        found[:, 0], _scores(given["q"].double(), given["w"].double(), given["k"][:, :, 0].double(), given["block_table"]), 512
    )


def test_indexer_ties_go_to_the_lowest_index():
    given = arguments("cann_ops_transformer.lightning_indexer")
    found, _ = call("cann_ops_transformer.lightning_indexer", w=torch.zeros_like(given["w"]))
    assert found[5, 0, :64].tolist() == list(range(64))


def test_the_wheels_indexer_knows_no_compression():
    """Its causal mask is over key positions: a query sees all keys up to its own position, not those of complete entries."""
    found, values = call("npu::npu_lightning_indexer")
    for _, t, p in cases.positions():
        assert sorted(found[t, 0][found[t, 0] >= 0].tolist()) == list(range(min(p + 1, 512)))
    assert values.shape == found.shape


def test_indexer_weights_outside_fp16_are_refused():
    with pytest.raises(models.Refused, match="range of fp16"):
        call(
            "custom::npu_quant_lightning_indexer",
            weights=torch.full((10, 64), 60000.0).half(),
            query_dequant_scale=torch.full((10, 64), 2.0).half(),
        )


def test_scatter_skips_negative_slots_in_one_package_only():
    given = arguments("custom::scatter_nd_update_asc")
    var, before = given["var"], given["var"].clone()
    call("custom::scatter_nd_update_asc", var=var)
    assert torch.equal(var[[3, 60]], given["update"][[0, 2]])
    rest = [i for i in range(64) if i not in (3, 60)]
    assert torch.equal(var[rest], before[rest])
    with pytest.raises(models.Refused, match="-1 is not skipped"):
        call("npu::npu_scatter_nd_update_", indices=given["indices"])


def test_scatter_writes_the_first_slot():
    given = arguments("custom::scatter_nd_update_asc")
    var = given["var"]
    call("custom::scatter_nd_update_asc", var=var, indices=torch.tensor([[0], [-1], [1]]))
    assert torch.equal(var[:2], given["update"][[0, 2]])


def test_scatter_leaves_a_slot_written_twice_undefined():
    update = torch.stack([torch.full((512,), float(i)) for i in (1, 2, 3)]).bfloat16()
    var = torch.zeros(64, 512).bfloat16()
    call("custom::scatter_nd_update_asc", var=var, indices=torch.tensor([[5], [5], [6]]), update=update)
    assert poisoned(var[5]) and torch.equal(var[6], update[2])
    call("custom::scatter_nd_update_asc", var=var, indices=torch.tensor([[5], [5], [6]]), update=update[[0, 0, 2]])
    assert torch.equal(var[5], update[0])


def test_scatter_returns_the_tensor_it_wrote():
    given = arguments("npu::npu_scatter_nd_update_")
    assert MODELS["npu::npu_scatter_nd_update_"](**given) is given["input"]
    assert torch.equal(given["input"][given["indices"][:, 0].long()], given["updates"])
