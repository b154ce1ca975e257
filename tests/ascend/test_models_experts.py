"""Models of gates, routing, grouped products and activations against other formulas, and the traps they carry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ascend.model_cases import V4_SWIGLU, arguments, call
from tests.ascend.model_checks import near, poisoned
from tools.npu_standin import models

pytestmark = pytest.mark.standin


def test_gate_scores_choice_and_weights():
    given = arguments("npu::npu_moe_gating_top_k")
    weights, ids, scores = call("npu::npu_moe_gating_top_k")
    expected = torch.log1p(given["x"].double().exp()).sqrt()
    near(scores, expected, 4)
    biased = expected + given["bias"].double()
    assert torch.equal(ids, biased.topk(6).indices.int())
    chosen = expected.gather(1, ids.long())
    near(weights, chosen / chosen.sum(1, keepdim=True) * 1.5, 8)


def test_gate_ties_go_to_the_lowest_index():
    _, ids, _ = call("npu::npu_moe_gating_top_k", x=torch.zeros(3, 256), bias=None)
    assert torch.equal(ids, torch.arange(6, dtype=torch.int32).expand(3, 6))


def test_gate_hash_takes_the_table_and_ignores_the_bias():
    table = torch.tensor([[5, 3, 9, 1, 0, 2], [200, 100, 50, 25, 12, 6]], dtype=torch.int32)
    tokens = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    weights, ids, scores = call("npu::npu_moe_gating_top_k", input_ids=tokens, tid2eid=table)
    assert torch.equal(ids, table[tokens])
    near(weights.sum(1), torch.full((7,), 1.5), 8)
    near(weights / 1.5, F.normalize(scores.gather(1, ids.long()), p=1.0, dim=1), 8)


def test_gate_scores_are_undefined_without_their_flag():
    assert poisoned(call("npu::npu_moe_gating_top_k", out_flag=False)[2])


def test_gate_softmax_is_not_renormalised():
    """norm_type 0 is the default, and gives other weights."""
    weights = call("npu::npu_moe_gating_top_k", norm_type=0, bias=None)[0]
    assert bool((weights.sum(1) < 1.4).all())


def test_gate_weights_come_in_the_type_of_the_logits():
    given = arguments("npu::npu_moe_gating_top_k")
    assert call("npu::npu_moe_gating_top_k", x=given["x"].bfloat16(), bias=None)[0].dtype == torch.bfloat16


ROUTING = "npu::npu_moe_init_routing_v2"


def _sorted_rows() -> tuple[torch.Tensor, list[int], torch.Tensor]:
    given = arguments(ROUTING)
    flat = given["expert_idx"].flatten().tolist()
    order = sorted(range(30), key=lambda i: (flat[i], i))
    return given["x"], order, given["expert_idx"].flatten()


def test_routing_is_stable_by_token():
    x, order, experts = _sorted_rows()
    rows, index, counts, scale = call(ROUTING)
    assert torch.equal(rows, x[torch.tensor(order) // 6])
    assert [int(index[i]) for i in order] == list(range(30))
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.bincount(experts.long(), minlength=16))
    assert scale.shape == (30,)
    assert poisoned(scale)


def test_routing_scatter_index_is_the_inverse():
    _, order, _ = _sorted_rows()
    assert call(ROUTING, row_idx_type=1)[1].tolist() == order


def test_routing_to_a_part_of_the_experts_leaves_the_rest_undefined():
    x, order, experts = _sorted_rows()
    mine = [i for i in order if 4 <= experts[i] < 9]
    used = len(mine)
    rows, index, counts, _ = call(ROUTING, active_expert_range=[4, 9])
    assert torch.equal(rows[:used], x[torch.tensor(mine) // 6])
    assert poisoned(rows[used:])
    assert [int(index[i]) for i in mine] == list(range(used))
    assert sorted(set(range(30)) - set(mine)) == (index == -1).nonzero().flatten().tolist()
    assert counts.tolist() == [int((experts == e).sum()) for e in range(4, 9)]
    by_row = call(ROUTING, active_expert_range=[4, 9], row_idx_type=1)[1]
    assert by_row[:used].tolist() == mine
    assert poisoned(by_row[used:])


def test_routing_counts_are_cumulative_by_default_and_undefined_without_their_flag():
    counts = call(ROUTING)[2]
    assert torch.equal(call(ROUTING, expert_tokens_num_type=0)[2], counts.cumsum(0))
    assert torch.equal(call(ROUTING, expert_tokens_num_type=2)[2], torch.stack((torch.arange(16), counts), 1))
    assert poisoned(call(ROUTING, expert_tokens_num_flag=False)[2])


def test_routing_quantises_rows():
    plain = call(ROUTING)[0].double()
    codes, _, _, scale = call(ROUTING, quant_mode=1)
    assert codes.dtype == torch.int8
    assert bool(((codes.double() * scale[:, None] - plain).abs() <= 0.5001 * scale[:, None]).all())


def test_finalize_routing_reads_indices_by_mode():
    given = arguments("npu::npu_moe_finalize_routing")
    rows, index, scales = (
        given["expanded_permuted_rows"].double(),
        given["expanded_src_to_dst_row"].long(),
        given["scales"].double(),
    )
    by_token = (rows[index].view(5, 6, 256) * scales[:, :, None]).sum(1)
    by_column = (rows[index].view(6, 5, 256).transpose(0, 1) * scales[:, :, None]).sum(1)
    near(call("npu::npu_moe_finalize_routing"), by_token, 2)
    near(call("npu::npu_moe_finalize_routing", drop_pad_mode=0), by_column, 2)
    skip = torch.randn(5, 256).bfloat16()
    near(call("npu::npu_moe_finalize_routing", skip1=skip, skip2=skip), by_token + 2 * skip.double(), 2)


GROUPED = "npu::npu_grouped_matmul"


def test_grouped_product_and_its_undefined_tail():
    given = arguments(GROUPED)
    (y,) = call(GROUPED)
    x, w = given["x"][0].double(), given["weight"][0].double()
    near(y[:10], torch.cat((x[:3] @ w[0], x[3:8] @ w[2], x[8:10] @ w[3])))
    assert poisoned(y[10:])


def test_grouped_product_reads_group_list_as_cumulative_by_default():
    counts, ends = torch.tensor([3, 0, 5, 2]), torch.tensor([3, 3, 8, 10])
    (by_counts,), (by_ends,) = call(GROUPED, group_list=counts), call(GROUPED, group_list=ends, group_list_type=0)
    assert torch.equal(by_counts, by_ends)
    pairs = torch.tensor([[0, 3], [2, 5], [3, 2]])
    assert torch.equal(call(GROUPED, group_list=pairs, group_list_type=2)[0], by_counts)
    # counts that happen to rise are taken for ends: wrong rows, no error
    rising = torch.tensor([1, 2, 3, 4])
    assert not torch.equal(call(GROUPED, group_list=rising)[0][:4], call(GROUPED, group_list=rising, group_list_type=0)[0][:4])


def test_grouped_product_w8a8():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randint(-127, 128, (12, 64), generator=g), torch.randint(-127, 128, (4, 64, 96), generator=g)
    scale, row = torch.rand(4, 96, generator=g).bfloat16(), torch.rand(12, generator=g)
    passed = {"x": [x.to(torch.int8)], "weight": [w.to(torch.int8)], "scale": [scale], "per_token_scale": [row]}
    (y,) = call(GROUPED, **passed, output_dtype=15)
    near(y[3:8], (x[3:8] @ w[2]).double() * scale[2].double() * row[3:8, None].double(), 2)
    with pytest.raises(models.Refused, match="bf16 scale for bf16 output"):
        call(GROUPED, **{**passed, "scale": [scale.float()]}, output_dtype=15)


SWIGLU = "npu::npu_dequant_swiglu_quant"


def _activated(gate: torch.Tensor, up: torch.Tensor, limit: float = 10.0) -> torch.Tensor:
    return F.silu(gate.double().clamp(max=limit)) * up.double().clamp(-limit, limit)


@pytest.mark.parametrize("op", [SWIGLU, "custom::npu_dequant_swiglu_clamp_quant"])
def test_dequant_swiglu_quant_clamps_and_leaves_its_tail_undefined(op):
    given = arguments(op)
    codes, scale = call(op)
    group = torch.tensor([0] * 3 + [2] * 5 + [3] * 2)
    x = given["x"][:10].double() * given["weight_scale"][group].double() * given["activation_scale"][:10, None].double()
    y = _activated(*x.chunk(2, 1))
    assert float(x.abs().max()) > 10
    assert bool(((codes[:10].double() * scale[:10, None] - y).abs() <= 0.502 * scale[:10, None]).all())
    assert poisoned(codes[10:])
    assert poisoned(scale[10:])


@pytest.mark.parametrize("op", [SWIGLU, "npu::npu_swiglu_mx_quant"])
def test_gate_and_up_alternate_in_mode_1_of_the_wheels_ops(op, on_chip):
    on_chip("950")
    x = (torch.randn(12, 256) * 20).bfloat16()
    plain = {"weight_scale": None, "activation_scale": None, "group_index": None} if op == SWIGLU else {}
    halves = call(op, x=x, **plain)
    alternating = torch.stack(x.chunk(2, 1), 2).flatten(1)
    for found, right in zip(call(op, x=alternating, **plain, swiglu_mode=1), halves, strict=True):
        assert torch.equal(found.view(torch.uint8), right.view(torch.uint8))
    assert not torch.equal(call(op, x=x, **plain, swiglu_mode=1)[0].float(), halves[0].float())


def test_finalize_routing_adds_in_fp32_with_fp32_scales():
    given = arguments("npu::npu_moe_finalize_routing")
    tokens, k = given["scales"].shape
    rows = torch.ones(tokens * k, 256).bfloat16()
    scales = torch.full((tokens, k), 2.0**-9 + 2.0**-20)
    found = call("npu::npu_moe_finalize_routing", expanded_permuted_rows=rows, scales=scales, skip1=torch.ones(tokens, 256).bfloat16())
    assert torch.equal(found, (torch.ones(tokens, 256) + k * float(scales[0, 0])).bfloat16())


def test_codes_take_their_scales_along(on_chip):
    on_chip("950")
    op = "npu::npu_moe_init_routing_v2"
    ids = arguments(op)["expert_idx"]
    x = torch.randn(len(ids), 256).to(torch.float8_e4m3fn)
    scale = torch.randint(100, 140, (len(ids), 4, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    rows, index, _, moved = call(op, x=x, scale=scale, quant_mode=-1, row_idx_type=1)
    tokens = index.long() // ids.shape[1]
    assert torch.equal(rows.view(torch.uint8), x.view(torch.uint8)[tokens])
    assert torch.equal(moved.view(torch.uint8), scale.view(torch.uint8)[tokens])


def test_dequant_swiglu_quant_has_the_defaults_of_another_model():
    x = (torch.randn(12, 256) * 20).bfloat16()
    bare = {"x": x, "weight_scale": None, "activation_scale": None, "group_index": None}
    right, scale = call(SWIGLU, **bare)
    for default in ({"activate_left": False}, {"swiglu_mode": 0}, {"clamp_limit": 7.0}, {"glu_alpha": 1.702}, {"glu_bias": 1.0}):
        other, other_scale = call(SWIGLU, **bare, **default)
        assert not torch.equal(right, other) or not torch.equal(scale, other_scale), default


def test_dequant_swiglu_quant_on_950_drops_the_clamp_without_activate_dim(on_chip):
    on_chip("950")
    gate, up = torch.full((4, 128), 50.0), torch.full((4, 128), 50.0)
    passed = {
        "x": torch.cat((gate, up), 1).bfloat16(),
        "weight_scale": None,
        "activation_scale": None,
        "group_index": None,
        **V4_SWIGLU,
    }
    assert float(call(SWIGLU, **passed)[1][0]) * 127 == pytest.approx(100, rel=1e-3)
    assert float(call(SWIGLU, **{**passed, "activate_dim": None})[1][0]) * 127 == pytest.approx(2500, rel=1e-3)


def test_clipped_swiglu_alternates_gate_and_up_by_default():
    x = arguments("npu::npu_clipped_swiglu")["x"]
    near(call("npu::npu_clipped_swiglu"), _activated(*x.chunk(2, 1)), 2)
    near(call("npu::npu_clipped_swiglu", interleaved=True), _activated(x[:, 0::2], x[:, 1::2]), 2)
    tail = call("npu::npu_clipped_swiglu", group_index=torch.tensor([3, 4]))
    near(tail[:7], _activated(*x[:7].chunk(2, 1)), 2)
    assert poisoned(tail[7:])


def test_plain_swiglu_has_no_clamp():
    x = arguments("npu::npu_swiglu")["input"]
    gate, up = x.double().chunk(2, 1)
    near(call("npu::npu_swiglu"), F.silu(gate) * up, 2)
    assert not torch.allclose(call("npu::npu_swiglu").double(), _activated(gate, up), rtol=0.1)


def test_group_quant_clamps_only_when_told(on_chip):
    on_chip("950")
    name = "custom::npu_swiglu_group_quant"
    x = arguments(name)["x"]
    codes, scales, origin = call(name)
    golden = _activated(*x[:10].chunk(2, 1))
    near(origin[:10], golden, 2)
    wide = torch.exp2(scales.view(torch.uint8).double().flatten(1)[:10] - 127).repeat_interleave(32, 1)
    assert bool(((codes[:10].double() * wide - golden).abs() <= golden.abs() / 15 + wide * 2**-9).all())
    assert all(poisoned(t[10:]) for t in (codes, scales, origin))
    assert poisoned(call(name, output_origin=False)[2])
    gate, up = x[:10].double().chunk(2, 1)
    near(call(name, clamp_limit=None)[2][:10], F.silu(gate) * up, 2)
    codes, scales, _ = call(name, quant_mode=0, round_scale=False)
    assert scales.shape == (12, 2)
    wide = scales[:10].double().repeat_interleave(128, 1)
    assert bool(((codes[:10].double() * wide - golden).abs() <= golden.abs() / 15 + wide * 2**-9).all())


def test_the_fused_product_and_activation_has_no_clamp():
    name = "npu::npu_grouped_matmul_swiglu_quant_v2"
    given = arguments(name)
    codes, scales = call(name)
    product = given["x"][3:8].double() @ given["weight"][0][2].double()
    product = product * given["weight_scale"][0][2].double() * given["x_scale"][3:8, None].double()
    gate, up = product.chunk(2, 1)
    golden = F.silu(gate) * up
    assert float(golden.abs().max()) > 100
    assert bool(((codes[3:8].double() * scales[3:8, None] - golden).abs() <= 0.502 * scales[3:8, None]).all())
    assert poisoned(codes[10:])


def test_the_older_permutation_there_and_back():
    given = arguments("npu::npu_moe_token_permute")
    rows, index = call("npu::npu_moe_token_permute")
    flat = given["indices"].flatten().tolist()
    order = sorted(range(30), key=lambda i: (flat[i], i))
    assert torch.equal(rows, given["tokens"][torch.tensor(order) // 6])
    probs = torch.full((5, 6), 0.25).bfloat16()
    back = call("npu::npu_moe_token_unpermute", permuted_tokens=rows, sorted_indices=index, probs=probs)
    near(back, given["tokens"].double() * 1.5, 2)
    with pytest.raises(models.Refused, match="probs"):
        call("npu::npu_moe_token_unpermute", probs=probs.float())
