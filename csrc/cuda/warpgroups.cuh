// How the warpgroups of a Hopper block work together: barriers in shared memory that count bytes or
// copies (PTX: mbarrier), barriers among some warps, and registers handed from one to the other.
#pragma once

#include "cuda/primitives.cuh"

#ifdef __CUDACC__

namespace sglite::cuda {

constexpr int kWarpgroup = 128;

// A barrier in shared memory. It is in phase 0 at first, and in the next one when `count` arrivals
// have come.
__device__ inline void barrier_init(uint64_t& barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
                 : "memory");
}
// Makes the barriers that this thread has set up known to the copy engine.
__device__ inline void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives; the phase also waits for so many bytes that the copy engine brings.
__device__ inline void barrier_arrive_for_bytes(uint64_t& barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
        "r"(bytes)
        : "memory");
}
// Arrives when all asynchronous copies that this thread has begun are done.
__device__ inline void barrier_arrive_after_copies(uint64_t& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier))
                 : "memory");
}
// Waits until the phase of this parity is over.
__device__ inline void barrier_wait(uint64_t& barrier, int parity) {
    const uint32_t address = shared_address(&barrier);
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over: }" ::"r"(address),
        "r"(parity)
        : "memory");
}

// Orders ordinary accesses of shared memory, asynchronous copies among them, that this thread has
// seen before what the matrix unit reads there next.
__device__ inline void show_to_matrix_unit() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier among `threads` threads, by number (1 to 15; 0 is __syncthreads).
__device__ inline void named_wait(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Sets the number of registers of each thread of this warpgroup, a multiple of 8. Raising waits
// until others have given up enough.
template <int kCount>
__device__ inline void raise_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ inline void lower_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace sglite::cuda

#endif
