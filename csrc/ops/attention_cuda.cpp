// Paged attention on a GPU: arguments checked, kernels called. Lengths and pages lie on the device,
// so what they hold is not checked here.
#include "ops/attention_cuda.h"

#include "cuda/attention.h"
#include "ops/attention.h"

namespace sglite::ops {

namespace {

constexpr const char* kPlan = "plan_attention";
constexpr int64_t kAlignment = 64;

void refuse(const std::string& what) {
    throw std::invalid_argument(std::string(kPlan) + ": " + what);
}

cuda::AttentionShape shape_of(const AttentionSizes& sizes) {
    const std::pair<const char*, int64_t> least_one[] = {
        {"page_size", sizes.page_size},       {"num_kv_heads", sizes.kv_heads},
        {"head_dim", sizes.head_dim},         {"num_heads", sizes.q_heads},
        {"window", sizes.window.value_or(1)},
    };
    for (const auto& [name, value] : least_one) {
        if (value < 1)
            refuse(std::string(name) + ": expected at least 1, got " + std::to_string(value));
    }
    if (sizes.q_heads % sizes.kv_heads) {
        refuse("num_heads: expected a multiple of the " + std::to_string(sizes.kv_heads) +
               " KV heads, got " + std::to_string(sizes.q_heads));
    }
    return {
        .requests = sizes.requests,
        .tokens = sizes.tokens,
        .table_width = sizes.table_width,
        .page_size = sizes.page_size,
        .q_heads = sizes.q_heads,
        .kv_heads = sizes.kv_heads,
        .head_dim = sizes.head_dim,
        .window = sizes.window.value_or(0),
        .max_query_tokens = sizes.max_query_tokens,
        .prefills = false,
    };
}

void check_workspace(const char* op, const Tensor& workspace, int64_t bytes) {
    const Check check(op, "workspace", workspace);
    check.dtype(DType::kUInt8).ndim(1).dense();
    if (workspace.size(0) < bytes || reinterpret_cast<uintptr_t>(workspace.data) % kAlignment)
        check.fail(std::to_string(bytes) + " bytes, aligned to " + std::to_string(kAlignment));
}

}  // namespace

int64_t attention_workspace(const AttentionSizes& sizes) {
    return cuda::AttentionLayout(shape_of(sizes)).bytes;
}

void plan_attention(const Tensor& workspace, const Tensor& page_table, const Tensor& query_start,
                    const Tensor& kv_lens, const Tensor& kv_end, const AttentionSizes& sizes) {
    Check(kPlan, "page_table", page_table)
        .dtype(DType::kInt32)
        .shape({sizes.requests, sizes.table_width})
        .dense()
        .same_device(query_start);
    Check(kPlan, "query_start", query_start)
        .dtype(DType::kInt32)
        .shape({sizes.requests + 1})
        .dense();
    Check(kPlan, "kv_lens", kv_lens)
        .dtype(DType::kInt32)
        .shape({sizes.requests})
        .dense()
        .same_device(query_start);
    Check(kPlan, "kv_end", kv_end)
        .dtype(DType::kInt32)
        .shape({sizes.tokens})
        .dense()
        .same_device(query_start);
    Check(kPlan, "workspace", workspace).same_device(query_start);
    if (query_start.device != DeviceType::kCUDA)
        refuse("query_start: expected a tensor on a CUDA device, got " + query_start.describe());
    const cuda::Kernels& kernels = cuda::kernels(kPlan);
    const cuda::Stream stream = cuda::stream_of(query_start);
    cuda::AttentionShape shape = shape_of(sizes);
    shape.prefills = !sizes.batch_invariant && kernels.takes_prefills(shape, stream.device);
    check_workspace(kPlan, workspace, cuda::AttentionLayout(shape).bytes);
    kernels.plan_attention(
        {
            .shape = shape,
            .query_start = query_start.ptr<const int32_t>(),
            .kv_lens = kv_lens.ptr<const int32_t>(),
            .kv_end = kv_end.ptr<const int32_t>(),
            .page_table = page_table.ptr<const int32_t>(),
            .workspace = workspace.data,
        },
        stream);
}

void paged_attention_cuda(const AttentionInputs& in, const Tensor& workspace,
                          int64_t max_query_tokens, bool batch_invariant) {
    constexpr const char* kOp = "paged_attention";
    AttentionSizes sizes = check_attention(in);
    sizes.max_query_tokens = max_query_tokens;
    cuda::AttentionShape shape = shape_of(sizes);
    if (shape.tokens == 0) return;
    const cuda::Kernels& kernels = cuda::kernels(kOp);
    const cuda::Stream stream = cuda::stream_of(in.q);
    shape.prefills = !batch_invariant && kernels.takes_prefills(shape, stream.device);
    cuda::AttentionArgs args{
        .shape = shape,
        .out = {in.out.data, in.out.stride(0), in.out.stride(1)},
        .q = {in.q.data, in.q.stride(0), in.q.stride(1)},
        .k_cache = in.k_cache.data,
        .v_cache = in.v_cache.data,
        .page_table = in.page_table.ptr<const int32_t>(),
        .query_start = in.query_start.ptr<const int32_t>(),
        .kv_lens = in.kv_lens.ptr<const int32_t>(),
        .kv_end = in.kv_end.ptr<const int32_t>(),
        .scale = in.scale,
        .soft_cap = in.soft_cap.value_or(0),
        .sinks = in.sinks ? in.sinks->ptr<const float>() : nullptr,
        .dtype = in.q.dtype,
        .workspace = workspace.data,
    };
    if (kernels.planned_attention(args)) {
        Check(kOp, "workspace", workspace).same_device(in.q);
        check_workspace(kOp, workspace, cuda::AttentionLayout(shape).bytes);
    } else {
        args.workspace = nullptr;
    }
    kernels.paged_attention(args, stream);
}

}  // namespace sglite::ops
