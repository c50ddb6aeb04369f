#include "cuda/kernels.h"
#include "ops/activation.h"
#include "ops/experts.h"

namespace sglite::ops {

namespace {

constexpr const char* kOp = "mix_experts";
constexpr int64_t kVector = 8;  // elements that a lane reads at once

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0; }

// Adds the weights' places to `pointers`; false where one is not as the kernel reads it.
bool take_weights(std::vector<const void*>& pointers, const char* name,
                  const std::vector<Tensor>& weights, const Tensor& x, int64_t n, int64_t k) {
    pointers.reserve(weights.size());
    for (const Tensor& weight : weights) {
        Check(kOp, name, weight).dtype(x.dtype).shape({n, k}).same_device(x);
        if (!weight.is_contiguous() || !is_aligned(weight)) return false;
        pointers.push_back(weight.data);
    }
    return true;
}

}  // namespace

bool mix_experts_cuda(const Tensor& out, const Tensor& x, const Tensor& weights,
                      const Tensor& experts, const std::vector<Tensor>& gate_up,
                      const std::vector<Tensor>& down, const std::string& activation,
                      const std::function<Tensor(int64_t)>& empty) {
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense_rows();
    const int64_t rows = x.size(0), hidden = x.size(1);
    const auto num_experts = static_cast<int64_t>(gate_up.size());
    if (x.dtype == DType::kFloat32 || num_experts < 1 || num_experts > kMostKernelExperts ||
        down.size() != gate_up.size()) {
        return false;
    }
    Check(kOp, "down", down[0]).ndim(2);
    const int64_t width = down[0].size(1);
    const bool fits = hidden % kVector == 0 && width % kVector == 0 && hidden && width &&
                      x.stride(0) % kVector == 0 && is_aligned(x);
    std::vector<const void*> gate_up_pointers, down_pointers;
    if (!fits || !take_weights(gate_up_pointers, "gate_up", gate_up, x, 2 * width, hidden) ||
        !take_weights(down_pointers, "down", down, x, hidden, width)) {
        return false;
    }
    Check(kOp, "out", out).dtype(x.dtype).shape({rows, hidden}).dense().same_device(x);
    Check(kOp, "weights", weights).dtype(DType::kFloat32).shape({rows, -1}).dense().same_device(x);
    const int64_t top_k = weights.size(1);
    Check(kOp, "experts", experts).dtype(DType::kInt64).shape({rows, top_k}).dense().same_device(x);
    if (top_k < 1 || top_k > num_experts) {
        Check(kOp, "experts", experts).fail("1 to " + std::to_string(num_experts) + " columns");
    }
    ExpertMixArgs args{
        .out = out.data,
        .x = x.data,
        .weights = weights.ptr<const float>(),
        .experts = experts.ptr<const int64_t>(),
        .gate_up = gate_up_pointers.data(),
        .down = down_pointers.data(),
        .workspace = nullptr,
        .rows = rows,
        .hidden = hidden,
        .width = width,
        .num_experts = num_experts,
        .top_k = top_k,
        .x_stride = x.stride(0),
        .activation = activation_named(kOp, activation),
        .dtype = x.dtype,
    };
    if (rows == 0) return true;
    const cuda::Kernels& kernels = cuda::kernels(kOp);
    const int64_t size = kernels.expert_mix_workspace(args);
    const Tensor workspace = empty(size);
    const Check check(kOp, "workspace", workspace);
    check.dtype(DType::kUInt8).ndim(1).dense().same_device(x);
    if (workspace.numel() < size || !is_aligned(workspace)) {
        check.fail(std::to_string(size) + " bytes, aligned to 16");
    }
    args.workspace = workspace.data;
    kernels.mix_experts(args, cuda::stream_of(x));
    return true;
}

}  // namespace sglite::ops
