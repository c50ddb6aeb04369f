#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"

namespace sglite::ops {

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots) {
    constexpr const char* kOp = "write_kv";
    Check(kOp, "k", k).ndim(3).dtype_in(kFloatTypes).dense_rows();
    const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2);
    Check(kOp, "v", v).dtype(k.dtype).shape({tokens, heads, head_dim}).dense_rows().same_device(k);
    Check(kOp, "k_cache", k_cache)
        .dtype(k.dtype)
        .shape({-1, -1, heads, head_dim})
        .dense()
        .same_device(k);
    const int64_t pages = k_cache.size(0), page_size = k_cache.size(1);
    Check(kOp, "v_cache", v_cache)
        .dtype(k.dtype)
        .shape({pages, page_size, heads, head_dim})
        .dense()
        .same_device(k);
    Check(kOp, "slots", slots).dtype(DType::kInt64).shape({tokens}).dense().same_device(k);
    const int64_t bytes = k.dtype == DType::kFloat32 ? 4 : 2;
    const auto side = [&](const Tensor& from, const Tensor& cache) {
        return WriteKvArgs::Side{static_cast<const char*>(from.data),
                                 static_cast<char*>(cache.data), from.stride(0) * bytes,
                                 from.stride(1) * bytes};
    };
    const WriteKvArgs args{
        .sides = {side(k, k_cache), side(v, v_cache)},
        .slots = slots.ptr<const int64_t>(),
        .tokens = tokens,
        .heads = heads,
        .head_bytes = head_dim * bytes,
    };
    if (k.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).write_kv(args, cuda::stream_of(k));
    }
    const int64_t limit = pages * page_size;
    for (int64_t token = 0; token < tokens; ++token) {
        if (args.slots[token] < 0 || args.slots[token] >= limit) {
            throw std::out_of_range(std::string(kOp) + ": slots[" + std::to_string(token) +
                                    "] is " + std::to_string(args.slots[token]) +
                                    ", but the cache has " + std::to_string(limit) + " slots");
        }
    }
    cpu::kernels().write_kv(args);
}

}  // namespace sglite::ops
