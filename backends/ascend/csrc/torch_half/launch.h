// Calling an aclnn kernel of an op package from torch, on symbols that libtorch_npu.so exports.
//
// Executed on CPU against torch_npu 2.13.0; not run on NPU hardware.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <acl/acl_base.h>

#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

// looks a name up in libcust_opapi.so of every installed op package, then in libopapi.so; null when none has it
void *GetOpApiFuncAddr(const char *name);
extern "C" const char *aclGetRecentErrMsg();

namespace v4_ascend {

inline bool has_kernel(const std::string &name)
{
    return GetOpApiFuncAddr((name + "GetWorkspaceSize").c_str()) != nullptr && GetOpApiFuncAddr(name.c_str()) != nullptr;
}

template <class F> F *address(const std::string &name)
{
    void *found = GetOpApiFuncAddr(name.c_str());
    TORCH_CHECK(found != nullptr, name, " is in no installed op package; build and install it as docs/ascend.md says");
    return reinterpret_cast<F *>(found);
}

inline aclDataType acl_type(at::ScalarType type)
{
    switch (type) {
    case at::kFloat: return ACL_FLOAT;
    case at::kHalf: return ACL_FLOAT16;
    case at::kBFloat16: return ACL_BF16;
    default: TORCH_CHECK(false, "no ACL type for ", type);
    }
}

// Descriptors of one call, with the tensors they point at: both must live until the kernel has been launched, which with
// TASK_QUEUE_ENABLE=1 happens on another thread.
class Descriptors {
public:
    Descriptors() = default;
    Descriptors(const Descriptors &) = delete;
    Descriptors &operator=(const Descriptors &) = delete;

    void *of(const at::Tensor &t)
    {
        using create = void *(const int64_t *, uint64_t, aclDataType, const int64_t *, int64_t, aclFormat, const int64_t *, uint64_t, void *);
        static create *make = address<create>("aclCreateTensor");
        const int64_t stored = static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
        tensors_.push_back(t);
        made_.push_back(make(t.sizes().data(), t.dim(), acl_type(t.scalar_type()), t.strides().data(), t.storage_offset(), ACL_FORMAT_ND,
                             &stored, 1, t.storage().mutable_data()));
        TORCH_CHECK(made_.back() != nullptr, "aclCreateTensor failed");
        return made_.back();
    }

    ~Descriptors()
    {
        using destroy = int(const void *);
        auto *end = reinterpret_cast<destroy *>(GetOpApiFuncAddr("aclDestroyTensor"));
        for (void *descriptor : made_)
            if (end != nullptr && descriptor != nullptr) end(descriptor);
    }

private:
    std::vector<void *> made_;
    std::vector<at::Tensor> tensors_;
};

// Both phases of one kernel: the question for its workspace now, the launch in the order of the current stream.
template <class... A> void launch(const std::string &name, std::shared_ptr<Descriptors> held, A... arguments)
{
    using first = int(A..., uint64_t *, void **);
    using second = int(void *, uint64_t, void *, aclrtStream);
    first *ask = address<first>(name + "GetWorkspaceSize");
    second *run = address<second>(name);
    aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
    struct { uint64_t bytes = 0; void *executor = nullptr; } found;
    const int refused = ask(arguments..., &found.bytes, &found.executor);
    if (refused != 0) {
        const char *text = aclGetRecentErrMsg();
        TORCH_CHECK(false, name, "GetWorkspaceSize returned ", refused, text != nullptr ? std::string(": ") + text : std::string());
    }
    at::Tensor workspace;
    void *memory = nullptr;
    if (found.bytes != 0) {
        workspace = at::empty({static_cast<int64_t>(found.bytes)}, at::TensorOptions(at::kByte).device(c10::DeviceType::PrivateUse1));
        memory = workspace.mutable_data_ptr();
    }
    at_npu::native::OpCommand::RunOpApiV2(name, [=]() -> int {
        (void)held;
        (void)workspace;
        return run(memory, found.bytes, found.executor, stream);
    });
}

} // namespace v4_ascend
