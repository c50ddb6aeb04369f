// Tiles of a tensor that Hopper's copy engine moves to shared memory by itself (PTX:
// cp.async.bulk.tensor). The engine wants a description of the tensor that only the driver can
// encode; the driver is found at run time, since the library does not link it.
#pragma once

#include "cuda/primitives.cuh"

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

namespace sglite::cuda {

// The driver's CUtensorMap. Kernels take it as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#ifdef __CUDACC__

// Describes [any, heads, head_dim] of 16-bit elements, contiguous and 16-byte aligned, in tiles of
// [rows, 1, 64], whose rows lie in shared memory as `swizzled` says. Columns past head_dim are
// zeros. False where the driver cannot do it.
inline bool make_tensor_map(TensorMap& map, const void* data, DType dtype, int64_t heads,
                            int64_t head_dim, int rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(
            error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
    }();
    if (!encode) return false;
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
    constexpr cuuint64_t kAnyRows = INT32_MAX;
    const auto columns = static_cast<cuuint64_t>(head_dim);
    const cuuint64_t sizes[] = {columns, static_cast<cuuint64_t>(heads), kAnyRows};
    const cuuint64_t strides[] = {columns * 2, columns * 2 * sizes[1]};
    const cuuint32_t tile[] = {64, 1, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1, 1};
    return encode(reinterpret_cast<CUtensorMap*>(&map),
                  dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  3, const_cast<void*>(data), sizes, strides, tile, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Copies the tile at a place of the tensor; `barrier` counts its bytes.
__device__ inline void copy_tile(void* shared, const TensorMap& map, int column, int head, int row,
                                 uint64_t& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(column), "r"(head), "r"(row), "r"(shared_address(&barrier))
        : "memory");
}

#endif

}  // namespace sglite::cuda
