#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

void apply_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin,
                bool interleaved) {
    constexpr const char* kOp = "apply_rope";
    Check(kOp, "q", q).ndim(3).dtype_in(kFloatTypes).dense_rows();
    const int64_t tokens = q.size(0), head_dim = q.size(2);
    Check(kOp, "k", k).dtype(q.dtype).shape({tokens, -1, head_dim}).dense_rows().same_device(q);
    Check(kOp, "positions", positions).dtype(DType::kInt64).shape({tokens}).dense().same_device(q);
    const Check table(kOp, "cos_sin", cos_sin);
    table.dtype(DType::kFloat32).ndim(2).dense().same_device(q);
    const int64_t limit = cos_sin.size(0), rotary_dim = cos_sin.size(1);
    if (rotary_dim % 2 || rotary_dim > head_dim) {
        table.fail("an even number of columns, at most the head size " + std::to_string(head_dim));
    }
    const RopeArgs args{
        .heads = {{q.data, q.size(1), q.stride(0), q.stride(1)},
                  {k.data, k.size(1), k.stride(0), k.stride(1)}},
        .positions = positions.ptr<const int64_t>(),
        .cos_sin = cos_sin.ptr<const float>(),
        .tokens = tokens,
        .rotary_dim = rotary_dim,
        .interleaved = interleaved,
        .dtype = q.dtype,
    };
    if (q.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).apply_rope(args, cuda::stream_of(q));
    }
    for (int64_t token = 0; token < tokens; ++token) {
        if (args.positions[token] < 0 || args.positions[token] >= limit) {
            throw std::out_of_range(std::string(kOp) + ": positions[" + std::to_string(token) +
                                    "] is " + std::to_string(args.positions[token]) +
                                    ", but cos_sin has " + std::to_string(limit) + " positions");
        }
    }
    cpu::kernels().apply_rope(args);
}

}  // namespace sglite::ops
