// linear_rows.cuh for 9 to 64 tokens: the same products added up in the same order, so that the
// bits are the same, with wider tiles, so that the rows of x are read by fewer blocks.
//
// The sums alone then fill the registers. What is on its way waits in shared memory: every lane
// copies there the 16-byte pieces that it will use itself, so that nobody waits for anybody else.
#pragma once

#include "cuda/linear_rows.cuh"

namespace sglite::cuda {

// Bytes of shared memory: the stages of all lanes, and afterwards the warps' sums.
template <int kGroups, int kOctets, int kStages>
size_t linear_wide_shared(int m, int warps) {
    const size_t stages = static_cast<size_t>(kStages) * (kGroups + kOctets) * 16 * kWarp * warps;
    const size_t sums = static_cast<size_t>(warps) * m * padded_row(8 * kGroups) * sizeof(float);
    return max(stages, sums);
}

// kGroups: eights of weight rows of the block. kOctets: eights of tokens, at least m / 8. kStages:
// pieces of 32 elements of k that are on their way or at work.
template <typename T, int kGroups, int kOctets, int kStages, int kMostWarps>
__global__ void __launch_bounds__(kMostWarps* kWarp) linear_wide_kernel(LinearRowsArgs args) {
    constexpr int kRows = 8 * kGroups, kTiles = kOctets / 2, kPieces = kGroups + kOctets;
    unsigned char* shared = dynamic_shared<unsigned char>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int g = lane / 4, t = lane % 4;
    // [stage][piece][lane]; the weights' pieces, then those of x.
    uint4* mine = reinterpret_cast<uint4*>(shared) + warp * (kStages * kPieces * kWarp) + lane;

    const T* weights[kGroups];
    for (int i = 0; i < kGroups; ++i)
        weights[i] = weight_row<T, kRows>(args, blockIdx.x, 8 * i + g);
    const T* x = static_cast<const T*>(args.x) + g * args.x_stride;

    // Step s of a warp is half a chunk of linear_rows_kernel's.
    const int chunks = (args.k + kLinearChunk - 1) / kLinearChunk;
    const int steps = warp < chunks ? 2 * ((chunks - warp + warps - 1) / warps) : 0;
    auto place_of = [&](int step) {
        return (warp + step / 2 * warps) * kLinearChunk + step % 2 * (kLinearChunk / 2) +
               t * kLinearLane;
    };
    auto copy_weights = [&](int step) {
        const int at = place_of(step);
        uint4* to = mine + step % kStages * (kPieces * kWarp);
        const bool valid = at < args.k;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            copy_async(to + i * kWarp, weights[i] + (valid ? at : 0), valid);
        }
    };
    auto copy_x = [&](int step) {
        const int at = place_of(step);
        uint4* to = mine + (step % kStages * kPieces + kGroups) * kWarp;
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
            const bool valid = at < args.k && 8 * i + g < args.m;
            copy_async(to + i * kWarp, valid ? x + 8 * i * args.x_stride + at : args.x, valid);
        }
    };
    // Weights do not depend on the kernel before, so that they are asked for while it still runs.
    let_next_kernel_start();
    for (int step = 0; step < min(kStages - 1, steps); ++step) copy_weights(step);
    wait_for_previous_kernel();
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) copy_x(step);
        commit_copies();
    }

    float sums[kTiles][kGroups][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait_copies<kStages - 2>();
        const uint4* from = mine + step % kStages * (kPieces * kWarp);
        uint4 columns[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) columns[i] = from[i * kWarp];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint4 top = from[(kGroups + 2 * tile) * kWarp];
            const uint4 bottom = from[(kGroups + 2 * tile + 1) * kWarp];
            const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
            const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                mma_16x8x16<T>(sums[tile][i], first, {columns[i].x, columns[i].y});
            }
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                mma_16x8x16<T>(sums[tile][i], second, {columns[i].z, columns[i].w});
            }
        }
        const int next = step + kStages - 1;
        if (next < steps) {
            copy_weights(next);
            copy_x(next);
        }
        commit_copies();
    }

    __syncthreads();  // the warps' sums lie where other warps' stages were
    float* partial_sums = reinterpret_cast<float*>(shared);
    store_sums(args, partial_sums, sums);
    __syncthreads();
    write_outputs<T, kRows>(args, blockIdx.x, partial_sums);
}

}  // namespace sglite::cuda
