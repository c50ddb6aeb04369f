#include <algorithm>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops.h"
#include "ops/ranges.h"

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
    check_range(kOp, "slots", args.slots, tokens, pages * page_size, "the cache");
    cpu::kernels().write_kv(args);
}

void copy_kv_slots(const std::vector<Tensor>& caches, const Tensor& sources,
                   const Tensor& destinations) {
    constexpr const char* kOp = "copy_kv_slots";
    Check(kOp, "sources", sources).dtype(DType::kInt64).ndim(1).dense();
    const int64_t count = sources.size(0);
    Check(kOp, "destinations", destinations)
        .dtype(DType::kInt64)
        .shape({count})
        .dense()
        .same_device(sources);
    std::vector<CopyKvSlotsArgs::Part> parts;
    int64_t widest = 0;
    for (const Tensor& cache : caches) {
        Check(kOp, "caches", cache)
            .dtype_in(kFloatTypes)
            .shape({caches[0].size(0), caches[0].size(1), -1, -1})
            .dense()
            .same_device(sources);
        const int64_t bytes = cache.dtype == DType::kFloat32 ? 4 : 2;
        parts.push_back({static_cast<char*>(cache.data), cache.size(2) * cache.size(3) * bytes});
        widest = std::max(widest, parts.back().row_bytes);
    }
    CopyKvSlotsArgs args{
        .parts = parts.data(),
        .sources = sources.ptr<const int64_t>(),
        .destinations = destinations.ptr<const int64_t>(),
        .workspace = nullptr,
        .num_parts = static_cast<int64_t>(parts.size()),
        .count = count,
    };
    if (parts.empty()) return;
    if (sources.device == DeviceType::kCUDA) {
        return cuda::kernels(kOp).copy_kv_slots(args, cuda::stream_of(sources));
    }
    const int64_t limit = caches[0].size(0) * caches[0].size(1);
    check_range(kOp, "sources", args.sources, count, limit, "the cache");
    check_range(kOp, "destinations", args.destinations, count, limit, "the cache");
    std::vector<char> workspace(count * widest);
    args.workspace = workspace.data();
    cpu::kernels().copy_kv_slots(args);
}

}  // namespace sglite::ops
