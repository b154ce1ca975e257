"""Check values of the specification for norms, rotation, quantisers and hyper-connections: exact numbers, not comparisons."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ops.hyper import sinkhorn
from ops.quant import e8m0_values
from ops.registry import bind

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(scope="module")
def ops() -> SimpleNamespace:
    return bind(("cpu",), dtype=torch.float32).ops


def scale_exponents(scale: Tensor) -> list[int]:
    return (scale.view(torch.uint8).int() - 127).flatten().tolist()


# section 16
Z = 8 * torch.tensor([[0, 1, 2, 3], [1, 0, -1, 2], [0.5, 0.5, 0, -2], [3, 1, -1, 0]])
COMB = torch.tensor(
    [
        [0.00000, 0.00096, 0.91120, 0.08075],
        [0.00928, 0.01092, 0.03084, 0.91925],
        [0.00278, 0.98773, 0.05685, 0.00000],
        [0.98794, 0.00039, 0.00110, 0.00000],
    ]
)


def hc_pre_of(ops: SimpleNamespace, z: Tensor, tokens: int, iters: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """hc_pre whose mixes are those of `base` alone: comb = Sinkhorn(z), pre = sigmoid(0) + eps, post = 1."""
    streams = torch.randn(tokens, 4, 8, generator=torch.Generator().manual_seed(0))
    base = torch.cat((torch.zeros(8), z.flatten()))
    kwargs = {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": iters}
    return ops.hc_pre(streams, torch.zeros(24, 32), torch.ones(3), base, **kwargs)


@pytest.mark.parametrize("tokens", [1, 3, 4, 300], ids=["one", "scalars", "products", "vectors"])
def test_sinkhorn_matrix(ops: SimpleNamespace, tokens: int) -> None:
    for comb in hc_pre_of(ops, Z, tokens)[2]:
        torch.testing.assert_close(comb, COMB, atol=5.5e-6, rtol=0)
        torch.testing.assert_close(comb.sum(0), torch.ones(4), atol=2e-6, rtol=0)
        torch.testing.assert_close(comb.sum(1), torch.tensor([0.99291, 0.97030, 1.04736, 0.98943]), atol=6e-6, rtol=0)


def test_sinkhorn_of_the_contract_is_that_of_the_specification() -> None:
    torch.testing.assert_close(sinkhorn(Z.double(), 1e-6, 20).float(), COMB, atol=5.5e-6, rtol=0)


def test_sinkhorn_counts_one_plus_nineteen_iterations(ops: SimpleNamespace) -> None:
    p = torch.softmax(Z.double(), -1) + 1e-6
    p = p / (p.sum(0) + 1e-6)
    torch.testing.assert_close(hc_pre_of(ops, Z, 1, iters=1)[2][0], p.float(), atol=1e-6, rtol=0)
    p = p / (p.sum(1, keepdim=True) + 1e-6)
    p = p / (p.sum(0, keepdim=True) + 1e-6)
    torch.testing.assert_close(hc_pre_of(ops, Z, 1, iters=2)[2][0], p.float(), atol=1e-6, rtol=0)


def test_pre_has_the_epsilon_and_post_is_doubled_without_it(ops: SimpleNamespace) -> None:
    streams = torch.ones(1, 4, 8)
    base = torch.cat((torch.full((4,), -40.0), torch.zeros(4), torch.zeros(16)))
    kwargs = {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": 20}
    x, post, comb = ops.hc_pre(streams, torch.zeros(24, 32), torch.ones(3), base, **kwargs)
    torch.testing.assert_close(x, torch.full((1, 8), 4e-6))
    assert torch.equal(post, torch.ones(1, 4))
    torch.testing.assert_close(comb, torch.full((1, 4, 4), 0.25))


def test_mixes_are_stream_major(ops: SimpleNamespace) -> None:
    streams = torch.zeros(1, 4, 8)
    streams[0, 2, 5] = 1.0
    fn = torch.zeros(4, 32)
    fn[1, 2 * 8 + 5] = 3.0
    kwargs = {"norm_eps": 1e-6, "hc_eps": 1e-6}
    fn[2, 2 * 8 + 5] = -2.0
    u = -2.0 / math.sqrt(1 / 32 + 1e-6)
    expected = 1 / (1 + math.exp(-(0.1 * u + 0.25))) + 1e-6
    x = ops.hc_head(streams, fn, torch.tensor([0.1]), torch.full((4,), 0.25), **kwargs)
    assert x[0, 5].item() == pytest.approx(expected, rel=1e-5)
    assert x[0].count_nonzero() == 1


def test_hc_post_contracts_the_first_index(ops: SimpleNamespace) -> None:
    streams = torch.eye(4)[None]
    comb = torch.arange(16.0).view(1, 4, 4)
    out = ops.hc_post(torch.zeros(1, 4), streams, torch.zeros(1, 4), comb)
    # stream k receives sum_j comb[j, k] X_j, and X_j is the unit vector j
    assert torch.equal(out[0], comb[0].T)
    alone = ops.hc_post(torch.ones(1, 4), streams, torch.tensor([[1.0, 2, 3, 4]]), 0 * comb)
    assert torch.equal(alone[0, 2], torch.full((4,), 3.0))


# section 10.3
@pytest.mark.parametrize(("largest", "exponent"), [(0.7, -9), (1.0, -8), (448.0, 0), (449.0, 1), (0.0, -22), (1e-4, -22)])
def test_fp8_scale_of_a_group(ops: SimpleNamespace, largest: float, exponent: int) -> None:
    x = torch.zeros(1, 128)
    x[0, 77] = -largest
    assert scale_exponents(ops.quant_fp8(x)[1]) == [exponent]


def test_fp8_scales_are_per_token_and_128_channels(ops: SimpleNamespace) -> None:
    x = torch.full((2, 300), 1.0)
    x[1, 128:256], x[1, 256:] = 448.0, 449.0
    assert scale_exponents(ops.quant_fp8(x)[1]) == [-8, -8, -8, -8, 0, 1]


def test_fp8_scale_is_the_smallest_sufficient_power(ops: SimpleNamespace) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 30, 64)[:, None]
    for row, e in zip(x.abs().amax(1).tolist(), scale_exponents(ops.quant_fp8(x)[1]), strict=True):
        assert math.ldexp(448, e - 1) < row <= math.ldexp(448, e)


def test_fp8_codes_round_to_nearest_even(ops: SimpleNamespace) -> None:
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([448.0, 17, 19, -17, 2**-10, 3 * 2**-10, 2**-9, 100.0])
    q, scale = ops.quant_fp8(x)
    assert q[0, :8].float().tolist() == [448, 16, 20, -16, 0, 2**-8, 2**-9, 96]
    assert torch.equal(ops.dequant_fp8(q, scale, dtype=torch.float32)[0, :8], q[0, :8].float())


def test_fp8_round_trip_leaves_the_rope_channels(ops: SimpleNamespace) -> None:
    x = torch.full((2, 128), 1.03)
    x[0, :64] = 100.3
    y = ops.roundtrip_fp8(x, channels=64)
    assert torch.equal(y[:, 64:], x[:, 64:])
    assert torch.equal(y[:, :64], torch.tensor([[104.0], [1.0]]).expand(2, 64))
    for row in (0, 1):
        q, scale = ops.quant_fp8(x[row : row + 1, :64], group=64)
        assert torch.equal(ops.dequant_fp8(q, scale, group=64, dtype=torch.float32), y[row : row + 1, :64])


def test_fp8_codes_have_their_values(ops: SimpleNamespace) -> None:
    code = torch.arange(256, dtype=torch.uint8)
    one = torch.full((1, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    value = ops.dequant_fp8(code.view(1, 256).view(torch.float8_e4m3fn), one, dtype=torch.float32)[0]
    for c, v in zip(code.tolist(), value.tolist(), strict=True):
        sign, exponent, mantissa = (-1) ** (c >> 7), c >> 3 & 15, c & 7
        if c & 127 == 127:
            assert math.isnan(v)
        else:
            assert v == sign * (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))


def test_fp8_weight_scales_are_blocks_of_128_by_128(ops: SimpleNamespace) -> None:
    w = torch.ones(256, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 128], [126, 120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    y = ops.dequant_fp8_block(w, scale, dtype=torch.float32)
    corners = [y[127, 127], y[0, 128], y[128, 0], y[255, 255]]
    assert [float(c) for c in corners] == [1.0, 2.0, 0.5, 2.0**-7]
    x = torch.zeros(1, 256)
    x[0, 200] = 1.0
    assert ops.linear_fp8(x, w, scale)[0, [0, 128]].tolist() == [2.0, 2.0**-7]


@pytest.mark.parametrize(("byte", "exponent"), [(0, -127), (1, -126), (118, -9), (127, 0), (128, 1), (254, 127)])
def test_e8m0_is_an_exponent(ops: SimpleNamespace, byte: int, exponent: int) -> None:
    value = 2.0**exponent
    scale = torch.full((1, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert e8m0_values(scale, torch.float64).item() == value
    one = torch.ones(1, 128).to(torch.float8_e4m3fn)
    assert ops.dequant_fp8(one, scale, dtype=torch.float32)[0, 0].item() == value


def test_e8m0_byte_255_is_nan(ops: SimpleNamespace) -> None:
    scale = torch.full((1, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert ops.dequant_fp8(torch.ones(1, 128).to(torch.float8_e4m3fn), scale, dtype=torch.float32).isnan().all()


def test_fp4_table_and_low_nibble_first(ops: SimpleNamespace) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.full((1, 16), 128, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    value = ops.dequant_mxfp4(packed, scale, dtype=torch.float32)[0]
    table = [*FP4, *(-v for v in FP4)]
    assert value[0::2].tolist() == [2 * table[b & 15] for b in range(256)]
    assert value[1::2].tolist() == [2 * table[b >> 4] for b in range(256)]


def test_fp4_quantiser_packs_the_even_channel_low(ops: SimpleNamespace) -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([6.0, -1.5, 0.5, 3.0])
    q, scale = ops.quant_mxfp4(x)
    assert q[0, :2].tolist() == [7 | (8 | 3) << 4, 1 | 5 << 4]
    assert scale_exponents(scale) == [0]


def test_fp4_ties_go_to_the_even_code(ops: SimpleNamespace) -> None:
    x = torch.zeros(1, 32)
    x[0, :9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, 6.0])
    q, scale = ops.quant_mxfp4(x)
    expected = [0, 1, 1, 2, 2, 4, 4, -1, 6]
    assert ops.dequant_mxfp4(q, scale, dtype=torch.float32)[0, :9].tolist() == expected
    assert ops.roundtrip_fp4(x)[0, :9].tolist() == expected


@pytest.mark.parametrize(("largest", "exponent"), [(6.0, 0), (6.01, 1), (3.0, -1), (7.0, 1), (0.0, -126), (1.0, -2)])
def test_fp4_scale_of_a_group(ops: SimpleNamespace, largest: float, exponent: int) -> None:
    x = torch.zeros(1, 64)
    x[0, 40] = largest
    assert scale_exponents(ops.quant_mxfp4(x)[1]) == [-126, exponent]


def test_fp4_neighbours_of_ties_are_not_rounded_twice(ops: SimpleNamespace) -> None:
    up, down = (torch.nextafter(torch.tensor(0.25), torch.tensor(v)).item() for v in (1.0, 0.0))
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([up, down, 6.0])
    assert ops.roundtrip_fp4(x)[0, :3].tolist() == [0.5, 0.0, 6.0]


def test_int8_scale_and_half_even(ops: SimpleNamespace) -> None:
    q, scale = ops.quant_int8(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0, 0, 0]]))
    assert scale.tolist() == [1.0, 0.0]
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]


# section 7
def test_hadamard_is_in_natural_order(ops: SimpleNamespace) -> None:
    h = ops.hadamard(torch.eye(8)) * math.sqrt(8)
    sylvester = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)])
    torch.testing.assert_close(h, sylvester)
    torch.testing.assert_close(ops.hadamard(ops.hadamard(torch.eye(128))), torch.eye(128), atol=1e-6, rtol=0)


# section 4.1
def test_rope_turns_interleaved_pairs_of_the_last_channels(ops: SimpleNamespace) -> None:
    x = torch.tensor([[5.0, 7.0, 1.0, 0.0, 0.0, 1.0]])
    cos, sin = torch.tensor([[0.6, 0.0]]), torch.tensor([[0.8, 1.0]])
    y = ops.rope(x, cos, sin)
    torch.testing.assert_close(y, torch.tensor([[5.0, 7.0, 0.6, 0.8, -1.0, 0.0]]))
    torch.testing.assert_close(ops.rope(x[:, None], cos, sin)[:, 0], y)
    torch.testing.assert_close(ops.rope(x, cos, sin, inverse=True), torch.tensor([[5.0, 7.0, 0.6, -0.8, 1.0, 0.0]]))


@pytest.mark.parametrize("shape", [(3, 128), (3, 2, 128), (300, 8, 128)], ids=str)
def test_inverse_rope_undoes_rope(ops: SimpleNamespace, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(2)
    x, angle = torch.randn(shape, generator=g), torch.rand(shape[0], 32, generator=g) * 1e5
    turned = ops.rope(x, angle.cos(), angle.sin())
    assert not torch.allclose(turned[..., -64:], x[..., -64:], atol=0.1)
    torch.testing.assert_close(ops.rope(turned, angle.cos(), angle.sin(), inverse=True), x, atol=2e-6, rtol=0)


def test_query_norm_comes_before_the_rotation_and_has_no_weight(ops: SimpleNamespace) -> None:
    q = torch.tensor([[[3.0, 4.0, 0.0, 0.0]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(ops.q_norm_rope(q, cos, sin, eps=0.0), torch.tensor([[[-1.6, 1.2, 0.0, 0.0]]]))


def test_rms_norm_has_no_plus_one_and_eps_inside_the_root(ops: SimpleNamespace) -> None:
    x, w = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([2.0, 0.5])
    torch.testing.assert_close(ops.rms_norm(x, w, eps=3.0), torch.tensor([[1.0, -0.25], [0.0, 0.0]]))
    torch.testing.assert_close(ops.rms_norm(x[:1], w, eps=3.0), torch.tensor([[1.0, -0.25]]))


# section 2.2
def test_linear_accumulates_in_fp32(ops: SimpleNamespace) -> None:
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    w = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    w[0, 1:] = 2.0**-9
    exact = 1 + 4095 * 2.0**-9
    assert ops.linear(x, w, out_dtype=torch.float32).item() == exact
    assert ops.linear(x, w).item() == torch.tensor(exact).bfloat16().item()


def test_large_fp32_products_are_true_fp32(ops: SimpleNamespace) -> None:
    g = torch.Generator().manual_seed(3)
    # 4 rows of a large weight: the CPU backend hands these to oneDNN
    x, w = torch.randn(4, 1024, generator=g), torch.randn(512, 1024, generator=g)
    error = (ops.linear(x, w).double() - x.double() @ w.double().T).abs().max()
    assert float(error) < 1e-4  # bf16 or tf32 products err by 3e-2 and more
