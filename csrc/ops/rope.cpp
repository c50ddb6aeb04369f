#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"
#include "ops/ranges.h"

namespace sglite::ops {

// cos_sin [positions, rotary_dim], for heads of head_dim channels.
static void check_table(const char* op, const Tensor& cos_sin, int64_t head_dim,
                        const Tensor& other) {
    const Check table(op, "cos_sin", cos_sin);
    table.dtype(DType::kFloat32).ndim(2).dense().same_device(other);
    const int64_t rotary_dim = cos_sin.size(1);
    if (rotary_dim % 2 || rotary_dim > head_dim) {
        table.fail("an even number of columns, at most the head size " + std::to_string(head_dim));
    }
    if (cos_sin.device == DeviceType::kCUDA && cos_sin.size(0) == 0) table.fail("a row or more");
}

void apply_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin,
                bool interleaved) {
    constexpr const char* kOp = "apply_rope";
    Check(kOp, "q", q).ndim(3).dtype_in(kFloatTypes).dense_rows();
    const int64_t tokens = q.size(0), head_dim = q.size(2);
    Check(kOp, "k", k).dtype(q.dtype).shape({tokens, -1, head_dim}).dense_rows().same_device(q);
    Check(kOp, "positions", positions).dtype(DType::kInt64).shape({tokens}).dense().same_device(q);
    check_table(kOp, cos_sin, head_dim, q);
    const RopeArgs args{
        .heads = {{q.data, q.size(1), q.stride(0), q.stride(1)},
                  {k.data, k.size(1), k.stride(0), k.stride(1)}},
        .positions = positions.ptr<const int64_t>(),
        .cos_sin = cos_sin.ptr<const float>(),
        .table_rows = cos_sin.size(0),
        .tokens = tokens,
        .head_dim = head_dim,
        .rotary_dim = cos_sin.size(1),
        .interleaved = interleaved,
        .dtype = q.dtype,
    };
    if (q.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).apply_rope(args, cuda::stream_of(q));
    }
    check_range(kOp, "positions", args.positions, tokens, cos_sin.size(0), "cos_sin");
    cpu::kernels().apply_rope(args);
}

namespace {

// The parts of rope_and_write_kv, one by one.
void run_parts(const RopeAndWriteKvArgs& args, const cuda::Kernels& kernels, cuda::Stream stream) {
    const int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
    const auto head = [&](int64_t token, int64_t index) {
        return static_cast<char*>(args.qkv) +
               (token * args.token_stride + index * args.head_dim) * bytes;
    };
    const auto norm_heads = [&](const void* weight, int64_t first, int64_t count) {
        // Rows that lie evenly are all tokens of a head, or all heads of a token.
        const bool by_head = count < args.tokens;
        for (int64_t i = 0; i < (by_head ? count : args.tokens); ++i) {
            void* rows = by_head ? head(0, first + i) : head(i, first);
            const int64_t stride = by_head ? args.token_stride : args.head_dim;
            const RmsNormArgs norm{
                .out = rows,
                .x = rows,
                .weight = weight,
                .residual = nullptr,
                .rows = by_head ? args.tokens : count,
                .width = args.head_dim,
                .out_stride = stride,
                .x_stride = stride,
                .residual_stride = 0,
                .epsilon = args.epsilon,
                .weight_offset = args.weight_offset,
                .dtype = args.dtype,
            };
            kernels.rms_norm(norm, stream);
        }
    };
    if (args.q_weight) {
        norm_heads(args.q_weight, 0, args.q_heads);
        norm_heads(args.k_weight, args.q_heads, args.kv_heads);
    }
    const RopeArgs rope{
        .heads = {{head(0, 0), args.q_heads, args.token_stride, args.head_dim},
                  {head(0, args.q_heads), args.kv_heads, args.token_stride, args.head_dim}},
        .positions = args.positions,
        .cos_sin = args.cos_sin,
        .table_rows = args.table_rows,
        .tokens = args.tokens,
        .head_dim = args.head_dim,
        .rotary_dim = args.rotary_dim,
        .interleaved = args.interleaved,
        .dtype = args.dtype,
    };
    kernels.apply_rope(rope, stream);
    const auto side = [&](int64_t first, void* cache) {
        return WriteKvArgs::Side{head(0, first), static_cast<char*>(cache),
                                 args.token_stride * bytes, args.head_dim * bytes};
    };
    const WriteKvArgs write{
        .sides = {side(args.q_heads, args.k_cache),
                  side(args.q_heads + args.kv_heads, args.v_cache)},
        .slots = args.slots,
        .tokens = args.tokens,
        .heads = args.kv_heads,
        .head_bytes = args.head_dim * bytes,
    };
    kernels.write_kv(write, stream);
}

}  // namespace

void rope_and_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                       const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                       const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                       double epsilon, double weight_offset, bool interleaved) {
    constexpr const char* kOp = "rope_and_write_kv";
    const Check heads(kOp, "qkv", qkv);
    heads.ndim(2).dtype_in(kFloatTypes).dense_rows();
    Check(kOp, "k_cache", k_cache).dtype(qkv.dtype).ndim(4).dense().same_device(qkv);
    const int64_t tokens = qkv.size(0), pages = k_cache.size(0), page_size = k_cache.size(1);
    const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
    Check(kOp, "v_cache", v_cache)
        .dtype(qkv.dtype)
        .shape({pages, page_size, kv_heads, head_dim})
        .dense()
        .same_device(qkv);
    if (qkv.size(1) % head_dim || qkv.size(1) < 2 * kv_heads * head_dim) {
        heads.fail("rows of whole heads of " + std::to_string(head_dim) + ", " +
                   std::to_string(kv_heads) + " of them keys and as many values");
    }
    for (const auto& [name, tensor] : {std::pair("positions", &positions), {"slots", &slots}}) {
        Check(kOp, name, *tensor).dtype(DType::kInt64).shape({tokens}).dense().same_device(qkv);
    }
    check_table(kOp, cos_sin, head_dim, qkv);
    if (q_norm.has_value() != k_norm.has_value()) {
        throw std::invalid_argument(std::string(kOp) + ": expected both of q_norm and k_norm");
    }
    if (q_norm) {
        for (const auto& [name, tensor] : {std::pair("q_norm", &*q_norm), {"k_norm", &*k_norm}}) {
            Check(kOp, name, *tensor).dtype(qkv.dtype).shape({head_dim}).dense().same_device(qkv);
        }
    }
    const RopeAndWriteKvArgs args{
        .qkv = qkv.data,
        .k_cache = k_cache.data,
        .v_cache = v_cache.data,
        .q_weight = q_norm ? q_norm->data : nullptr,
        .k_weight = k_norm ? k_norm->data : nullptr,
        .positions = positions.ptr<const int64_t>(),
        .slots = slots.ptr<const int64_t>(),
        .cos_sin = cos_sin.ptr<const float>(),
        .tokens = tokens,
        .q_heads = qkv.size(1) / head_dim - 2 * kv_heads,
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .token_stride = qkv.stride(0),
        .table_rows = cos_sin.size(0),
        .rotary_dim = cos_sin.size(1),
        .epsilon = static_cast<float>(epsilon),
        .weight_offset = static_cast<float>(weight_offset),
        .interleaved = interleaved,
        .dtype = qkv.dtype,
    };
    if (qkv.device == DeviceType::kCUDA) {
        const cuda::Kernels& kernels = cuda::kernels(kOp);
        const cuda::Stream stream = cuda::stream_of(qkv);
        if (!kernels.rope_and_write_kv(args, stream)) run_parts(args, kernels, stream);
        return;
    }
    check_range(kOp, "positions", args.positions, tokens, args.table_rows, "cos_sin");
    check_range(kOp, "slots", args.slots, tokens, pages * page_size, "the cache");
    cpu::kernels().rope_and_write_kv(args);
}

}  // namespace sglite::ops
