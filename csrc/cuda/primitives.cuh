// What the kernels are written in: number formats, warps, matrix instructions, asynchronous copies,
// launches. Kernels use these and plain CUDA C++ only, so that the same source also runs on the
// emulator (emulator/simt.h), which a machine without a GPU tests them with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "tensor.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulator/simt.h"
#endif

namespace sglite::cuda {

constexpr int kWarp = 32;

// ---- number formats ---------------------------------------------------------------------------

// float16 by its bits: the compiler for the device has no `_Float16`.
struct Half {
    uint16_t bits;
};

template <typename T>
struct FormatOf;  // DType of a kernel's element type
template <>
struct FormatOf<float> {
    static constexpr DType value = DType::kFloat32;
};
template <>
struct FormatOf<BFloat16> {
    static constexpr DType value = DType::kBFloat16;
};
template <>
struct FormatOf<Half> {
    static constexpr DType value = DType::kFloat16;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
#ifdef __CUDACC__
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
#else
inline float to_float(Half x) { return emulator::half_to_float(x.bits); }
#endif

// Rounds to nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
#ifdef __CUDACC__
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Half from_float<Half>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
#else
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    return {emulator::float_to_bfloat16(x)};
}
template <>
inline Half from_float<Half>(float x) {
    return {emulator::float_to_half(x)};
}
#endif

// Two neighbours in one register, the first in the lower half.
template <typename T>
__device__ inline uint32_t pack_pair(float first, float second) {
    static_assert(sizeof(T) == 2);
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <typename T>
__device__ inline float2 unpack_pair(uint32_t pair) {
    static_assert(sizeof(T) == 2);
    return float2{to_float(T{static_cast<uint16_t>(pair & 0xFFFF)}),
                  to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// N elements that are loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T values[N];
    __device__ T& operator[](int i) { return values[i]; }
    __device__ const T& operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ inline Vector<T, N> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, typename T>
__device__ inline void store_vector(T* to, const Vector<T, N>& vector) {
    *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

// 16 bytes that are read once and by nobody else: they do not displace what the caches hold.
__device__ inline uint4 load_streamed(const void* from) {
#ifdef __CUDACC__
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
#else
    return *static_cast<const uint4*>(from);
#endif
}

// Asks for the line of memory at `address` to be in the L2 cache soon. A hint: nothing is read.
__device__ inline void prefetch_line([[maybe_unused]] const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// A value that another kernel may be writing meanwhile: the old one or the new one, never of a
// stale cache.
__device__ inline int64_t load_relaxed(const int64_t* from) {
#ifdef __CUDACC__
    int64_t value;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
#else
    return *from;
#endif
}

// 16 bytes that another block has written in this launch: read past this processor's own cache.
__device__ inline float4 load_written_by_others(const float* from) {
#ifdef __CUDACC__
    return __ldcg(reinterpret_cast<const float4*>(from));
#else
    return *reinterpret_cast<const float4*>(from);
#endif
}

// 2^x, to about 2 units in the last place; 0 for -infinity.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// Rounded one by one: the compiler may not contract them into a fused multiply-add.
#ifdef __CUDACC__
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
#else
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
#endif
__device__ inline float subtract(float a, float b) { return add(a, -b); }

// The upper 64 bits of the product.
__device__ inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDACC__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// ---- warps ------------------------------------------------------------------------------------

// A value of each of the 32 lanes of a warp; all must take part.
template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <typename T>
__device__ inline T shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// The same in every lane, and in the same order of additions in each.
__device__ inline float warp_sum(float value) {
    for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int mask = kWarp / 2; mask; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// ---- matrix instructions ----------------------------------------------------------------------

// d[16 x 8] += a[16 x 16] * b[16 x 8] by one warp, in float32 (PTX: mma.m16n8k16). With
// g = lane / 4 and t = lane % 4 a lane holds, as pairs of neighbours along k,
//   a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..],
//   b[0] = B[2t..][g], b[1] = B[2t + 8..][g], and as numbers
//   d[0] = D[g][2t], d[1] = D[g][2t + 1], d[2] = D[g + 8][2t], d[3] = D[g + 8][2t + 1].
template <typename T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    if constexpr (FormatOf<T>::value == DType::kBFloat16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    emulator::mma_16x8x16(d, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#endif
}

#ifdef __CUDACC__
__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Four 8 x 8 matrices of 16-bit elements out of shared memory. Lane 8 i + r gives the address of
// row r (16 bytes) of matrix i; result[i] is the pair [lane / 4][2 (lane % 4)..] of matrix i, or of
// its transpose.
__device__ inline void load_matrices(uint32_t (&result)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::load_matrices(result, row, false);
#endif
}
__device__ inline void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emulator::load_matrices(result, row, true);
#endif
}

// ---- asynchronous copies ----------------------------------------------------------------------

// 16 bytes from global to shared memory, both aligned; zeros where not `valid` (then nothing is
// read). Done once `wait_copies` has returned, and seen by other threads after a barrier behind it.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(global), "r"(valid ? 16 : 0)
        : "memory");
#else
    emulator::copy_async(shared, global, valid);
#endif
}
// Ends a group of copies.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::commit_copies();
#endif
}
// Waits until all groups of this thread but the last `kLeft` are done.
template <int kLeft>
__device__ inline void wait_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
    emulator::wait_copies(kLeft);
#endif
}

// ---- launches ---------------------------------------------------------------------------------

// The dynamic shared memory of the block, 128-byte aligned.
template <typename T>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char sglite_dynamic_shared[];
    return reinterpret_cast<T*>(sglite_dynamic_shared);
#else
    return static_cast<T*>(emulator::dynamic_shared());
#endif
}

// Blocks that run at the same time, as neighbours on the chip, and see each other's shared memory
// (thread block clusters; sm_90). Before sm_90, a block is a cluster of its own.
__device__ inline unsigned cluster_size() {
#ifdef __CUDACC__
    unsigned size = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
    return size;
#else
    return emulator::cluster_size();
#endif
}
// A barrier for all threads of the cluster, in two halves: what was written before the one is seen
// after the other. A block may not end while others read or write its shared memory.
__device__ inline void cluster_arrive() {
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
#else
    emulator::cluster_arrive();
#endif
}
__device__ inline void cluster_wait() {
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
#else
    emulator::cluster_wait();
#endif
}
__device__ inline void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}
// The place in the shared memory of the cluster's block `rank` that `shared` is in the own block's.
template <typename T>
__device__ inline T* cluster_shared(T* shared, unsigned rank) {
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;"
        : "=l"(address)
        : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    return shared;
#endif
#else
    return static_cast<T*>(emulator::cluster_shared(shared, rank));
#endif
}

// With `Launch::overlaps`, a kernel may start while the one before it on the stream still runs. It
// waits here before it reads what that one writes. (Programmatic dependent launch; sm_90.)
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Says that the next kernel may start; it still waits for this one's end before it reads.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Launch {
    const char* op;  // for the message when the launch fails
    dim3 grid;
    int threads;  // of a block
    size_t shared_bytes = 0;
    Stream stream{};
    bool overlaps = false;
    int cluster = 1;  // blocks of a cluster, along x
    // Blocks that a multiprocessor should have shared memory for, and no more: the rest of that
    // memory is its first-level cache, through which ordinary loads pass. 0: it is divided as CUDA
    // likes, which may be as the kernel before had it.
    int resident = 0;
};

inline void check(const char* op, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
    }
}

#ifdef __CUDACC__
// Makes a device the current one of this thread, for as long as it lives.
class DeviceGuard {
  public:
    DeviceGuard(const char* op, int device) {
        check(op, cudaGetDevice(&before_));
        if (before_ == device) return;
        check(op, cudaSetDevice(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};
#endif

// Runs a kernel; throws, naming the op, if it cannot be launched.
template <auto kKernel, typename... Arguments>
void launch(const Launch& settings, const Arguments&... arguments) {
    if (settings.grid.x == 0 || settings.grid.y == 0 || settings.grid.z == 0) return;
#ifdef __CUDACC__
    const DeviceGuard guard(settings.op, settings.stream.device);
    constexpr size_t kAlwaysAllowed = 48 * 1024;
    if (settings.shared_bytes > kAlwaysAllowed) {
        check(settings.op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(settings.shared_bytes)));
    }
    cudaLaunchAttribute attributes[3] = {};
    unsigned count = 0;
    if (settings.overlaps) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (settings.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(settings.cluster), 1, 1};
    }
    if (settings.resident) {
        int most = 0;
        check(settings.op,
              cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                     settings.stream.device));
        constexpr size_t kReserved = 1024;  // by CUDA, of each block
        const size_t bytes = settings.resident * (settings.shared_bytes + kReserved);
        attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
        attributes[count++].val.sharedMemCarveout =
            static_cast<unsigned>(std::min<size_t>(100, (100 * bytes + most - 1) / most));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = settings.grid;
    config.blockDim = dim3(settings.threads);
    config.dynamicSmemBytes = settings.shared_bytes;
    config.stream = static_cast<cudaStream_t>(settings.stream.handle);
    config.attrs = attributes;
    config.numAttrs = count;
    check(settings.op, cudaLaunchKernelEx(&config, kKernel, arguments...));
#else
    emulator::launch(settings.op, settings.grid, settings.threads, settings.cluster,
                     settings.shared_bytes, [&] { kKernel(arguments...); });
#endif
}

}  // namespace sglite::cuda
