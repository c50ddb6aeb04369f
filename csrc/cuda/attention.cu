// Which kernels do the attention of a batch.
#include "cuda/attention.h"

#include <array>
#include <bit>
#include <mutex>

#include "cuda/attention_launch.cuh"
#include "cuda/attention_prefill.h"

namespace sglite::cuda {

Machine machine_of(int device) {
#ifdef __CUDACC__
    int multiprocessors = 0, bytes = 0;
    check("paged_attention",
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check("paged_attention",
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return {multiprocessors, static_cast<size_t>(bytes)};
#else
    (void)device;
    return {3, 227 * 1024};
#endif
}

int blocks_per_multiprocessor(const void* kernel, int device, int threads, size_t shared_bytes) {
#ifdef __CUDACC__
    const DeviceGuard guard("paged_attention", device);
    check("paged_attention",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
    int blocks = 0;
    check("paged_attention",
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return std::max(blocks, 1);
#else
    (void)kernel, (void)device, (void)threads, (void)shared_bytes;
    return 1;
#endif
}

bool planned_attention(const AttentionArgs& args) {
    const AttentionShape& shape = args.shape;
    if (args.sinks || args.dtype == DType::kFloat32 || shape.head_dim % 8 ||
        !padded_head_dim(shape.head_dim) ||
        !std::has_single_bit(static_cast<uint64_t>(shape.page_size))) {
        return false;
    }
    return aligned16<Half>(
        {args.q.token_stride, args.q.head_stride, args.out.token_stride, args.out.head_stride},
        {args.q.data, args.out.data, args.k_cache, args.v_cache});
}

void paged_attention(const AttentionArgs& args, Stream stream) {
    if (!args.workspace) return attention_plain(args, stream);
    attention_decode(args, stream);
    if (args.shape.has_extends()) attention_extend(args, stream);
    if (args.shape.prefills) attention_prefill(args, stream);
}

}  // namespace sglite::cuda
