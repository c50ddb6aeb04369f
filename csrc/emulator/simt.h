// Runs CUDA kernels on the CPU, one cluster of blocks after the other, so that they can be tested
// where there is no GPU: the part of the CUDA language that the kernels use, as plain C++.
//
// Each CUDA thread is a fiber that runs until it meets a barrier or a warp's collective operation.
// The emulator is as unkind as the hardware may be: shared memory starts as NaN, what an
// asynchronous copy brings is NaN until it has been waited for, threads run far ahead of each
// other, and writing beyond shared memory, misaligned copies, collectives that not all lanes reach
// and barriers that not all threads reach are errors. Time is not emulated.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- the language -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // kernels without clusters: blocks run one after the other
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct int2 {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace sglite::emulator {

struct Position {
    dim3 thread, block, block_size, grid;
};
const Position& position();  // of the fiber that runs

void block_barrier();

// Of the cluster of blocks that runs; `cluster_shared` gives the place in another block's dynamic
// shared memory that corresponds to one in the own block's.
void cluster_arrive();
void cluster_wait();
unsigned cluster_size();
void* cluster_shared(void* shared, unsigned rank);

// Every lane gives `size` bytes and gets those of all lanes, `kSlot` bytes apart. `what` must be
// the same in all lanes.
constexpr size_t kSlot = 64;
const std::byte* exchange(const char* what, const void* mine, size_t size);

template <typename T>
struct Lanes {
    const std::byte* slots;
    T operator[](int lane) const {
        T value;
        std::memcpy(&value, slots + lane * kSlot, sizeof value);
        return value;
    }
};
template <typename T>
Lanes<T> exchange(const char* what, const T& mine) {
    static_assert(sizeof(T) <= kSlot);
    return {exchange(what, &mine, sizeof mine)};
}

inline int lane() { return static_cast<int>(position().thread.x % 32); }

void* dynamic_shared();
void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int left);
void load_matrices(uint32_t (&result)[4], const void* row, bool transposed);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

// See primitives.cuh; `number` turns the bits of an element into a float.
template <typename Number>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number number) {
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const auto lanes = exchange("mma_16x8x16", mine);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row_half = i / 2, column = 2 * t + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const int pair = k / 8, owner = k % 8 / 2, shift = k % 2 * 16;
            const uint32_t left = lanes[g * 4 + owner].a[row_half + 2 * pair] >> shift;
            const uint32_t right = lanes[column * 4 + owner].b[pair] >> shift;
            sum += number(static_cast<uint16_t>(left)) * number(static_cast<uint16_t>(right));
        }
        d[i] = sum;
    }
}

// Runs `kernel` once for every thread of the grid; throws what a thread throws.
void launch(const char* op, dim3 grid, int threads, int cluster_size, size_t shared_bytes,
            const std::function<void()>& kernel);

}  // namespace sglite::emulator

#define threadIdx (::sglite::emulator::position().thread)
#define blockIdx (::sglite::emulator::position().block)
#define blockDim (::sglite::emulator::position().block_size)
#define gridDim (::sglite::emulator::position().grid)

// ---- the library ------------------------------------------------------------------------------

inline void __syncthreads() { ::sglite::emulator::block_barrier(); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { ::sglite::emulator::exchange("__syncwarp", 0); }
inline int __syncthreads_or(int) = delete;
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return ::sglite::emulator::exchange("__shfl_xor_sync",
                                        value)[::sglite::emulator::lane() ^ mask];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return ::sglite::emulator::exchange("__shfl_sync", value)[lane % 32];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
    const int lane = ::sglite::emulator::lane();
    const auto lanes = ::sglite::emulator::exchange("__shfl_up_sync", value);
    return lane >= delta ? lanes[lane - delta] : value;
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
    const int lane = ::sglite::emulator::lane();
    const auto lanes = ::sglite::emulator::exchange("__shfl_down_sync", value);
    return lane + delta < 32 ? lanes[lane + delta] : value;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const auto lanes = ::sglite::emulator::exchange("__ballot_sync", predicate != 0);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(lanes[lane]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xFFFFFFFFu;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __uint2double_rn(unsigned x) { return x; }
template <typename T>
T __ldg(const T* pointer) {
    return *pointer;
}

template <typename T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
using std::isinf;
using std::isnan;

// Threads take turns, so a plain operation is an atomic one.
template <typename T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <typename T>
T atomicMax(T* address, T value) {
    const T old = *address;
    if (old < value) *address = value;
    return old;
}
template <typename T>
T atomicMin(T* address, T value) {
    const T old = *address;
    if (value < old) *address = value;
    return old;
}
template <typename T>
T atomicOr(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}
template <typename T>
T atomicExch(T* address, T value) {
    const T old = *address;
    *address = value;
    return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}
