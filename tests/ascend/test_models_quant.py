"""Models of the quantised ops: formats by their definition, codes within half a step, products of what the codes mean, and the traps."""

from __future__ import annotations

import pytest
import torch

from ops.quant_fp4 import fp4_codes, quant_int8
from tests.ascend.model_cases import E8M0, FP4, arguments, call
from tests.ascend.model_checks import near, poisoned
from tests.ascend.model_variants import VARIANTS
from tools.npu_standin import models
from tools.npu_standin.models import blocks
from tools.npu_standin.models.codes import storage_of, type_of

pytestmark = pytest.mark.standin

DYNAMIC, BLOCKS, MX, ANTI = (
    "npu::npu_dynamic_quant",
    "npu::npu_dynamic_block_quant",
    "npu::npu_dynamic_mx_quant",
    "npu::npu_anti_mx_quant",
)
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_type_numbers():
    assert type_of(1) == type_of(258) == torch.int8
    assert type_of(24) == type_of(292) == torch.float8_e4m3fn
    assert type_of(44) == type_of(293) == torch.float8_e8m0fnu
    assert storage_of(type_of(296)) == storage_of(type_of(290)) == torch.uint8
    with pytest.raises(ValueError, match="type number 999"):
        type_of(999)


def test_e2m1_takes_the_nearest_value_and_the_even_code_between_two():
    assert blocks.from_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == VALUES + [-v for v in VALUES]
    grid = torch.linspace(-8, 8, 6401)
    found = blocks.from_e2m1(blocks.to_e2m1(grid))
    best = (grid.abs()[:, None] - torch.tensor(VALUES)).abs().min(1).values
    assert torch.allclose((found.abs() - grid.abs()).abs(), best)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert blocks.to_e2m1(middles).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert torch.equal(blocks.to_e2m1(grid), fp4_codes(grid))


def test_fp4_packs_the_even_value_low():
    assert blocks.pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)).tolist() == [[0x21, 0x43]]
    assert blocks.unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8)).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("up,expected", [(False, [-8, -8, 0, 0, 0]), (True, [-8, -8, 0, 0, 1])])
def test_scale_algorithms(up, expected):
    """floor(log2 amax) - 8 against the least power that keeps amax below 448."""
    amax = torch.tensor([1.0, 1.75, 256.0, 448.0, 449.0])
    assert blocks.scale_exponents(amax, torch.float8_e4m3fn, round_up=up).tolist() == expected


def test_the_floor_algorithm_saturates():
    """With scale_alg 0 values between 448 and 512 of a block's scale are clipped; with 1 they are not."""
    x = torch.zeros(1, 32)
    x[0, 0] = 500.0
    floor = blocks.mx_values(*blocks.mx_quantised(x, torch.float8_e4m3fn, round_up=False), torch.float8_e4m3fn)
    up = blocks.mx_values(*blocks.mx_quantised(x, torch.float8_e4m3fn, round_up=True), torch.float8_e4m3fn)
    assert float(floor[0, 0]) == 448.0
    assert float(up[0, 0]) == 512.0


def test_a_scale_without_a_block_is_undefined():
    scales = blocks.mx_quantised(torch.ones(2, 96), torch.float8_e4m3fn, round_up=True)[1]
    assert scales.shape == (2, 2, 2)
    assert poisoned(scales[:, 1, 1])


def test_dynamic_quant_is_the_int8_contract():
    x = arguments(DYNAMIC)["input"]
    codes, scale = call(DYNAMIC)
    golden, golden_scale = quant_int8.reference(x)
    assert scale.shape == (5,)
    assert torch.equal(codes, golden)
    assert torch.equal(scale, golden_scale.flatten())
    assert call(DYNAMIC, input=torch.zeros(2, 64).bfloat16())[0].abs().sum() == 0


def test_dynamic_quant_on_950_is_int8_unless_told(on_chip):
    on_chip("950")
    assert call(DYNAMIC, dst_type=None)[0].dtype == torch.int8
    codes, scale = call(DYNAMIC)
    assert codes.dtype == torch.float8_e4m3fn
    x = arguments(DYNAMIC)["input"].double()
    assert torch.allclose(scale.double(), x.abs().amax(1) / 448, rtol=1e-6)
    assert bool(((codes.double() * scale.double()[:, None] - x).abs() <= x.abs() / 16 + 2**-9 * scale.double()[:, None]).all())


def test_block_quant(on_chip):
    on_chip("950")
    x = torch.randn(200, 300).bfloat16()
    codes, scale = call(BLOCKS, x=x, row_block_size=128)
    assert scale.shape == (2, 3)
    wide = scale.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert bool(((codes.double() * wide - x.double()).abs() <= x.double().abs() / 16 + 2**-9 * wide).all())
    assert float(scale[1, 2]) == pytest.approx(float(x[128:, 256:].abs().max()) / 448)


@pytest.mark.parametrize("kind", [292, FP4])
def test_mx_quant_and_back(kind, on_chip):
    on_chip("950")
    x = arguments(MX)["input"]
    codes, scales = call(MX, dst_type=kind)
    assert scales.dtype == torch.uint8
    assert codes.shape == ((5, 256) if kind == FP4 else (5, 512))
    back = call(ANTI, x=codes, mxscale=scales, src_type=kind)
    step = torch.exp2(scales.double().flatten(1) - 127).repeat_interleave(32, 1)
    # half a step: values up to 6 or 448 with 1 or 3 bits of mantissa
    allowed = x.double().abs() / (4 if kind == FP4 else 16) + step * (0.25 if kind == FP4 else 2**-10)
    assert bool(((back.double() - x.double()).abs() <= allowed + 2**-8 * x.double().abs()).all())


def test_mx_quant_gives_fp4_by_default(on_chip):
    on_chip("950")
    assert models.MODELS[MX](arguments(MX)["input"])[0].dtype == torch.uint8


def test_norm_and_mx_quant_are_the_two_ops(on_chip):
    on_chip("950")
    given = arguments("npu::npu_rms_norm_dynamic_mx_quant")
    codes, scales, rstd = call("npu::npu_rms_norm_dynamic_mx_quant")
    y = given["x"].double() * rstd.double() * given["gamma"].double()
    step = torch.exp2(scales.double().flatten(1) - 127).repeat_interleave(32, 1)
    assert bool(((codes.double() * step - y).abs() <= y.abs() / 15 + step * 2**-9).all())
    near(rstd[:, 0], given["x"].double().square().mean(1).add(1e-6).rsqrt(), 4)


def test_anti_mx_reads_bytes_as_e4m3_by_default(on_chip):
    on_chip("950")
    packed, scales = call(MX, dst_type=FP4)
    with pytest.raises(models.Refused, match="MX scales"):
        models.MODELS[ANTI](packed, scales)


def _changes(variant: str) -> tuple[str, dict]:
    name, _, make = VARIANTS[variant]
    return name, make(torch.Generator().manual_seed(2))


def test_quant_matmul_int8():
    given = arguments("npu::npu_quant_matmul")
    exact = given["x1"].long() @ given["x2"].long()
    near(call("npu::npu_quant_matmul"), exact.double() * given["scale"].double() * given["pertoken_scale"].double()[:, None], 2)
    bias = torch.randint(-1000, 1000, (96,), dtype=torch.int32)
    shifted = (exact + bias).double() * given["scale"].double() * given["pertoken_scale"].double()[:, None]
    near(call("npu::npu_quant_matmul", bias=bias), shifted, 2)


def _mx(codes: torch.Tensor, scales: torch.Tensor, fp4: bool = False) -> torch.Tensor:
    """Values [R, K] of rows of MX codes, one element at a time by definition."""
    wide = torch.stack((codes & 15, codes >> 4), -1).flatten(1) if fp4 else codes
    values = torch.tensor(VALUES + [-v for v in VALUES], dtype=torch.float64)[wide.long()] if fp4 else wide.double()
    return values * torch.exp2(scales.flatten(1).double() - 127).repeat_interleave(32, 1)[:, : values.shape[1]]


def test_quant_matmul_mx(on_chip):
    on_chip("950")
    name, given = _changes("npu_quant_matmul-mxfp8")
    left = _mx(given["x1"], given["pertoken_scale"])
    right = _mx(given["x2"].T, given["scale"].transpose(0, 1))
    near(call(name, **given), left @ right.T, 3)


def test_quant_matmul_mx_takes_weight_and_scale_laid_out_alike(on_chip):
    on_chip("950")
    name, given = _changes("npu_quant_matmul-mxfp8")
    with pytest.raises(models.Refused, match="both transposed views"):
        call(name, **{**given, "scale": given["scale"].contiguous()})
    copied = {"x2": given["x2"].contiguous(), "scale": given["scale"].contiguous()}
    assert torch.equal(call(name, **{**given, **copied}), call(name, **given))


def test_quant_matmul_fp8_blocks(on_chip):
    on_chip("950")
    name, given = _changes("npu_quant_matmul-fp8 blocks")
    exact = given["x1"].double() @ given["x2"].double()
    near(call(name, **given), exact * given["scale"].double() * given["pertoken_scale"].double(), 3)


ROWS = {0: (0, 3), 2: (3, 8), 3: (8, 10)}


@pytest.mark.parametrize("kind", ["mxfp8", "w4a8", "w4a4", "w4a4 as stored"])
def test_grouped_product_mx(kind, on_chip):
    on_chip("950")
    name, given = _changes(f"npu_grouped_matmul-{kind}")
    left = _mx(given["x"][0], given["per_token_scale"][0], kind.startswith("w4a4"))
    (found,) = call(name, **given)
    for e, (first, end) in ROWS.items():
        weight = given["weight"][0][e]
        if kind in ("w4a8", "w4a4 as stored"):  # [K/2, N] seen from [N, K/2], scales [K/64, N, 2]
            right = _mx(weight.T, given["antiquant_scale" if kind == "w4a8" else "scale"][0][e].transpose(0, 1), True)
        elif kind == "w4a4":  # [K, N/2]: neighbours of N share a byte
            codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
            right = _mx(codes.T[:, ::2] | (codes.T[:, 1::2] << 4), given["scale"][0][e].transpose(0, 1), True)
        else:
            right = _mx(weight.T, given["scale"][0][e].transpose(0, 1))
        near(found[first:end], left[first:end] @ right.T, 3)
    assert poisoned(found[10:])


def test_scales_of_a_weight_come_in_pairs(on_chip):
    """[E, K/32, N], the hub's scales transposed, is not the layout: [E, K/64, N, 2] is."""
    on_chip("950")
    name, given = _changes("npu_grouped_matmul-w4a8")
    flat = given["antiquant_scale"][0].transpose(2, 3).flatten(1, 2)
    with pytest.raises(models.Refused, match="scale of an expert"):
        call(name, **{**given, "antiquant_scale": [flat]})


def test_fp4_without_x_dtype_is_refused(on_chip):
    """The wheel then takes N for N/2."""
    on_chip("950")
    name, given = _changes("npu_grouped_matmul-w4a4")
    with pytest.raises(models.Refused, match="x_dtype=296"):
        call(name, **{**given, "x_dtype": None})


def test_scales_must_be_named_as_e8m0(on_chip):
    on_chip("950")
    name, given = _changes("npu_grouped_matmul-mxfp8")
    for argument in ("scale_dtype", "per_token_scale_dtype"):
        assert given[argument] == E8M0
        with pytest.raises(models.Refused, match=argument):
            call(name, **{**given, argument: None})


def test_transposed_product_of_flash_fits_and_of_pro_does_not():
    name = "npu::npu_transpose_batchmatmul"
    given = arguments(name)
    exact = torch.einsum("tgk,gkn->tgn", given["input"].double(), given["weight"].double())
    near(call(name), exact, 2)
    call(name, input=torch.ones(1, 8, 4096).bfloat16(), weight=torch.ones(8, 4096, 16).bfloat16())
    with pytest.raises(models.Refused, match="V4-Pro"):
        call(name, input=torch.ones(1, 16, 4096).bfloat16(), weight=torch.ones(16, 4096, 16).bfloat16())


def test_the_epilog_writes_scales_that_the_attention_does_not_read(on_chip):
    """Its mode 2 stores e8m0 scales (7 bytes) where npu_kv_quant_sparse_attn_sharedkv documents bf16 scales (14 bytes)."""
    on_chip("950")
    x = torch.randn(3, 512).bfloat16()
    cache = torch.full((4, 640), 0xCD, dtype=torch.uint8)
    models.MODELS["custom::kv_compress_epilog"](cache, x, torch.tensor([2, -1, 0], dtype=torch.int32))
    assert poisoned(cache[[1, 3]])
    assert poisoned(cache[[0, 2], 583:])
    row = cache[2]
    scale = torch.exp2(row[576:583].double() - 127).repeat_interleave(64)
    back = row[:448].view(torch.float8_e4m3fn).double() * scale
    assert bool(((back - x[0, :448].double()).abs() <= x[0, :448].double().abs() / 16 + scale * 2**-10).all())
    assert torch.equal(row[448:576].view(torch.bfloat16), x[0, 448:])


def test_the_indexer_epilog(on_chip):
    on_chip("950")
    x = torch.randn(3, 128).bfloat16()
    cache, scale = torch.zeros(2, 2, 1, 128, dtype=torch.uint8), torch.zeros(2, 2, 1)
    models.MODELS["custom::indexer_compress_epilog"](cache, scale, x, torch.tensor([3, -1, 0], dtype=torch.int32))
    rows, factors = cache.view(4, 128).view(torch.float8_e4m3fn).double(), scale.flatten().double()
    for slot, source in ((3, 0), (0, 2)):
        assert float(factors[slot]) == 2.0 ** round(float(factors[slot].log2()))
        error = (rows[slot] * factors[slot] - x[source].double()).abs()
        assert bool((error <= x[source].double().abs() / 16 + factors[slot] * 2**-10).all())
    assert not cache.view(4, 128)[[1, 2]].any()
