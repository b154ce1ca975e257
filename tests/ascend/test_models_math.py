"""Models of norm, rope and hyper-connections against other formulas, and the traps they carry."""

from __future__ import annotations

import pytest
import torch

from ops.hyper import hc_post, hc_pre
from ops.norm import rms_norm
from ops.rope import rope
from tests.ascend.model_cases import arguments, call
from tests.ascend.model_checks import near
from tools.npu_standin import models
from tools.npu_standin.models import hyper
from tools.npu_standin.models.rounding import hf32

pytestmark = pytest.mark.standin


def test_norm():
    given = arguments("npu::npu_rms_norm")
    y, rstd = call("npu::npu_rms_norm")
    near(y, rms_norm.reference(given["input"].double(), given["gamma"].double(), eps=1e-6, compute=torch.float64))
    near(rstd[:, 0], given["input"].double().square().mean(1).add(1e-6).rsqrt(), 4)


def test_norm_adds_epsilon_to_the_mean():
    tiny = torch.full((1, 512), 1e-3)
    y, _ = call("npu::npu_rms_norm", input=tiny, gamma=torch.ones(512), epsilon=1e-6)
    near(y, torch.full((1, 512), 0.5**0.5, dtype=torch.float64), 4)


def test_norm_and_int8():
    given = arguments("custom::npu_rms_norm_dynamic_quant")
    codes, scale = call("custom::npu_rms_norm_dynamic_quant")
    y = rms_norm.reference(given["x"].double(), given["gamma"].double(), eps=1e-6, compute=torch.float64)
    assert scale.shape == (5,)
    assert torch.equal(codes.abs().amax(1), torch.full((5,), 127, dtype=torch.int8))
    assert bool(((codes.double() * scale[:, None] - y).abs() <= 0.5001 * scale[:, None]).all())


def test_rope_turns_pairs_and_minus_sin_turns_back():
    given = arguments("custom::inplace_partial_rotary_mul")
    x, before = given["x"], given["x"].clone()
    cos, sin = given["r1"][:, 0, 0, ::2], given["r2"][:, 0, 0, ::2]
    assert call("custom::inplace_partial_rotary_mul", x=x) is None
    near(x[:, :, 0], rope.reference(before[:, :, 0].double(), cos.double(), sin.double(), compute=torch.float64))
    assert torch.equal(x[..., :448], before[..., :448])
    call("custom::inplace_partial_rotary_mul", x=x, r2=-given["r2"])
    assert float((x.float() - before.float()).abs().max()) < 0.05


def test_rope_reads_every_angle_where_it_stands():
    """Angles in halves (c0, c1, .., c0, c1, ..) instead of pairs give something else."""
    given = arguments("custom::inplace_partial_rotary_mul")
    halves = [given[r][..., ::2].repeat(1, 1, 1, 2) for r in ("r1", "r2")]
    right, wrong = given["x"].clone(), given["x"].clone()
    call("custom::inplace_partial_rotary_mul", x=right)
    call("custom::inplace_partial_rotary_mul", x=wrong, r1=halves[0], r2=halves[1])
    assert not torch.allclose(right.float(), wrong.float(), atol=0.1)


def test_rope_of_cann_ops_transformer_rotates_nothing_by_default():
    x = arguments("cann_ops_transformer::inplace_partial_rotary_mul")["x"]
    before = x.clone()
    call("cann_ops_transformer::inplace_partial_rotary_mul", x=x, partial_slice=(0, 0))
    assert torch.equal(x, before)


def test_rotary_mul_defaults_to_halves():
    given = arguments("npu::npu_rotary_mul")
    x, cos, sin = (given[k].double() for k in ("input", "r1", "r2"))
    near(call("npu::npu_rotary_mul"), rope.reference(x[0], cos[0, :, 0, ::2], sin[0, :, 0, ::2], compute=torch.float64)[None])
    low, high = x.chunk(2, -1)
    near(call("npu::npu_rotary_mul", rotary_mode="half"), x * cos + torch.cat((-high, low), -1) * sin)


def test_on_950_cos_may_be_shared_by_all(on_chip):
    shared = torch.ones(1, 1, 1, 64)
    with pytest.raises(models.Refused, match="every angle twice"):
        call("custom::inplace_partial_rotary_mul", r1=shared, r2=shared)
    on_chip("950")
    call("custom::inplace_partial_rotary_mul", r1=shared, r2=shared)


def test_hf32_cuts_the_mantissa_towards_zero():
    assert hf32(torch.tensor([1 + 2**-10, 1 + 2**-11, -(1 + 2**-11), 1.0, 0.0])).tolist() == [1 + 2**-10, 1.0, -1.0, 1.0, 0.0]
    x = torch.randn(1000)
    assert bool((hf32(x).abs() <= x.abs()).all())
    assert float(((hf32(x) - x) / x).abs().max()) < 2**-10


def _hc(exact: bool) -> list[torch.Tensor]:
    hyper.set_exact(exact)
    try:
        return list(call("custom::npu_hc_pre"))
    finally:
        hyper.set_exact(False)


def _hc_golden() -> list[torch.Tensor]:
    given = arguments("custom::npu_hc_pre")
    parameters = (given["hc_fn"].double(), given["hc_scale"].double(), given["hc_base"].double())
    return list(hc_pre.reference(given["x"].double(), *parameters, norm_eps=1e-6, hc_eps=1e-6, iters=20, compute=torch.float64))


def test_hc_pre_multiplies_in_hf32():
    golden = _hc_golden()
    exact, real = [[float((y.double() - g).abs().max()) for y, g in zip(_hc(e), golden, strict=True)] for e in (True, False)]
    assert exact[1] < 2e-6
    assert exact[2] < 2e-5
    # cutting hc_fn to 10 bits moves post and comb by far more than fp32 does
    assert real[1] > 20 * exact[1]
    assert real[2] > 20 * exact[2]
    assert real[1] < 4e-3


def test_hc_post_sums_over_the_first_index_of_comb():
    for name, streams, y, post, comb in (
        ("custom::npu_hc_post", "residual", "x", "post", "comb"),
        ("npu::npu_mhc_post", "x", "h_out", "h_post", "h_res"),
    ):
        given = arguments(name)
        golden = hc_post.reference(*(given[k].double() for k in (y, streams, post, comb)), compute=torch.float64)
        near(call(name), golden, 2)
        assert not torch.allclose(call(name, **{comb: given[comb].transpose(1, 2).contiguous()}).double(), golden, atol=0.1)


@pytest.mark.parametrize("hf32", [False, True])
def test_mhc_pre_returns_raw_logits_and_no_more(hf32, on_chip):
    on_chip("950")
    h_in, post, logits, *rest = call("npu::npu_mhc_pre", inner_precise=int(hf32))
    assert rest == [None, None, None]
    given = arguments("npu::npu_mhc_pre")
    parameters = (given["phi"].double(), given["alpha"].double(), given["bias"].double())
    y, golden_post, comb = hc_pre.reference(
        given["x"].double(), *parameters, norm_eps=1e-6, hc_eps=1e-6, iters=20, compute=torch.float64
    )
    error = float((post.double() - golden_post).abs().max())
    assert 1e-5 < error < 4e-3 if hf32 else error < 1e-5
    assert float((h_in.double() - y).abs().max()) < 0.05
    assert not torch.allclose(logits.double(), comb, atol=0.01)
    assert float((call("npu::npu_mhc_sinkhorn", x=logits)[0].double() - comb).abs().max()) < 5e-3
