// v4_ascend::hc_head, torch half: schema, argument checks, Meta and the launch of aclnnV4HcHead.
//
// x[t] = sum_j (sigmoid(u_j * scale + base_j) + hc_eps) * streams[t, j], u = fn . flat(streams[t]) / sqrt(mean(square) + norm_eps),
// all of it in fp32 with one rounding at the end. streams [T, 4, D] bf16, fp16 or fp32; fn fp32 [4, 4D]; scale fp32 [1]; base fp32 [4].
// Executed on CPU against torch_npu 2.13.0; not run on NPU hardware.
#include <cmath>

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "launch.h"

namespace {

constexpr const char *KERNEL = "aclnnV4HcHead";
constexpr int64_t STREAMS = 4; // the kernel keeps one accumulator for each
constexpr int64_t LANES = 64;  // fp32 values of one vector instruction
constexpr int64_t WIDEST = 16384;

void check_weight(const char *name, const at::Tensor &found, const at::Tensor &streams, c10::SymIntArrayRef shape)
{
    TORCH_CHECK(found.scalar_type() == at::kFloat && found.sym_sizes() == shape, "hc_head: ", name, " is ", found.scalar_type(), " ",
                found.sym_sizes(), ", expected Float ", shape);
    TORCH_CHECK(found.device() == streams.device(), "hc_head: ", name, " is on ", found.device(), ", streams on ", streams.device());
    TORCH_CHECK(found.is_contiguous(), "hc_head: ", name, " is not contiguous");
}

// The vendor's host code checks almost nothing, so everything that the kernel relies on is checked here, for Meta too.
void check(const at::Tensor &streams, const at::Tensor &fn, const at::Tensor &scale, const at::Tensor &base, double norm_eps, double hc_eps)
{
    const auto type = streams.scalar_type();
    TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat, "hc_head: streams is ", type,
                ", expected BFloat16, Half or Float");
    TORCH_CHECK(streams.dim() == 3, "hc_head: streams has ", streams.dim(), " dimensions, expected [T, 4, D]");
    const c10::SymInt tokens = streams.sym_size(0), count = streams.sym_size(1), width = streams.sym_size(2);
    TORCH_CHECK(tokens > 0, "hc_head: there is no token");
    TORCH_CHECK(count == STREAMS, "hc_head: found ", count, " streams, the kernel has 4");
    TORCH_CHECK(width > 0 && width % LANES == 0 && width <= WIDEST, "hc_head: width ", width,
                " is no multiple of 64 up to 16384");
    TORCH_CHECK(streams.is_contiguous(), "hc_head: streams is not contiguous");
    const std::vector<c10::SymInt> weights{STREAMS, width * STREAMS}, one{1}, four{STREAMS};
    check_weight("fn", fn, streams, weights);
    check_weight("scale", scale, streams, one);
    check_weight("base", base, streams, four);
    TORCH_CHECK(std::isfinite(norm_eps) && norm_eps >= 0, "hc_head: norm_eps is ", norm_eps, ", expected finite and not negative");
    TORCH_CHECK(std::isfinite(hc_eps) && hc_eps >= 0, "hc_head: hc_eps is ", hc_eps, ", expected finite and not negative");
}

at::Tensor result(const at::Tensor &streams) { return at::empty_symint({streams.sym_size(0), streams.sym_size(2)}, streams.options()); }

at::Tensor hc_head_meta(const at::Tensor &streams, const at::Tensor &fn, const at::Tensor &scale, const at::Tensor &base, double norm_eps,
                        double hc_eps)
{
    check(streams, fn, scale, base, norm_eps, hc_eps);
    return result(streams);
}

at::Tensor hc_head_npu(const at::Tensor &streams, const at::Tensor &fn, const at::Tensor &scale, const at::Tensor &base, double norm_eps,
                       double hc_eps)
{
    check(streams, fn, scale, base, norm_eps, hc_eps);
    const c10::DeviceGuard guard(streams.device());
    at::Tensor out = result(streams);
    auto held = std::make_shared<v4_ascend::Descriptors>();
    // order of the generated aclnn function: inputs, attributes, outputs (op_host/v4_hc_head.cpp)
    void *x = held->of(streams), *weights = held->of(fn), *factor = held->of(scale), *bias = held->of(base), *y = held->of(out);
    v4_ascend::launch(KERNEL, held, x, weights, factor, bias, norm_eps, hc_eps, y);
    return out;
}

bool hc_head_installed() { return v4_ascend::has_kernel(KERNEL); }

} // namespace

TORCH_LIBRARY(v4_ascend, m)
{
    m.def("hc_head(Tensor streams, Tensor fn, Tensor scale, Tensor base, *, float norm_eps, float hc_eps) -> Tensor");
    m.def("hc_head_installed() -> bool", hc_head_installed);
}
TORCH_LIBRARY_IMPL(v4_ascend, PrivateUse1, m) { m.impl("hc_head", hc_head_npu); }
TORCH_LIBRARY_IMPL(v4_ascend, Meta, m) { m.impl("hc_head", hc_head_meta); }
