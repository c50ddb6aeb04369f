// A linear layer for few rows of x ("tokens"), which reads every weight once, as fast as memory
// gives it.
//
// Tokens are the rows of the matrix instruction's A and outputs the columns of its B. A weight lies
// as the checkpoint has it, [n, k]: lane (g, t) of a warp takes 16 bytes of row g, eight elements,
// and uses them as the fragments of two instructions. That permutes k, which changes nothing while
// the fragments of x are taken from the same places. So nothing is shuffled or staged, and all that
// a warp holds in registers may be in flight.
//
// A block goes over tiles of 8 * kGroups outputs; its warps take turns at k, 64 elements a time,
// and the weights of the next tile are on their way before this one is done. The order in which
// products are added up depends on the number of warps alone, which follows from n and k (see
// linear.cu): an output's bits do not depend on how many tokens there are.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/norm.cuh"
#include "cuda/primitives.cuh"

namespace sglite::cuda {

struct LinearRowsArgs {
    void* out;             // [m, n] of T or float
    const void* x;         // [m, k] of T
    const void* weight;    // [n, k] of T; where gated [2 * n, k], gate first
    const void* bias;      // [n] ([2 * n]) of T or null
    const void* residual;  // [m, n] of out's type or null
    // With kNorm x is normalised first, row by row.
    const void* norm_weight;  // [k] of T
    float epsilon, weight_offset;
    int m, n, k;
    int64_t out_stride, x_stride, weight_stride, residual_stride;
    bool is_gated;  // out = activation(gate) * up
    Activation activation;
    bool to_float32;
};

constexpr int kLinearChunk = 64;  // elements of k that a warp takes at a time
constexpr int kLinearLane = 8;    // of which a lane takes twice so many

// Elements between two rows of x in shared memory: lanes of neighbouring rows find theirs in
// different banks.
inline __host__ __device__ int x_row_stride(int k) {
    return (k + kLinearChunk - 1) / kLinearChunk * kLinearChunk + kLinearChunk / 2;
}

// Where a warp leaves its sums: [warp][token][row]. Padded, so that the lanes of a warp, which have
// eight tokens, write to different banks.
inline __host__ __device__ constexpr int padded_row(int rows) { return rows + 8; }

struct LinearShared {
    size_t norm_weight, norm_sums, partial_sums, bytes;  // offsets; rows of x lie at 0
    size_t tile;                                         // bytes of one tile's sums, of two
};
inline __host__ __device__ LinearShared linear_shared(int m, int k, int rows, int warps,
                                                      bool holds_x, bool is_normed) {
    LinearShared shared{};
    size_t at = holds_x ? static_cast<size_t>(m) * x_row_stride(k) * 2 : 0;
    if (is_normed) {
        shared.norm_weight = at;
        at += (static_cast<size_t>(k) * 2 + 15) / 16 * 16;
        shared.norm_sums = at;
        at += static_cast<size_t>(m) * kWarp * sizeof(float);
    }
    shared.partial_sums = at;
    shared.tile = static_cast<size_t>(warps) * m * padded_row(rows) * sizeof(float);
    shared.bytes = at + 2 * shared.tile;
    return shared;
}

// Normalises the rows of x into shared memory, with the arithmetic of rms_norm. Its threads are
// emulated: what a warp of rms_norm's block would add up, a warp of this block does.
template <typename T>
__device__ void norm_rows(const LinearRowsArgs& args, T* rows, const T* norm_weight, float* sums) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int vectors = args.k / kLinearLane, stride = x_row_stride(args.k);
    const int threads = norm_threads(vectors), norm_warps = threads / kWarp;
    const T* x = static_cast<const T*>(args.x);
    for (int pair = warp; pair < args.m * norm_warps; pair += warps) {
        const int row = pair / norm_warps, thread = pair % norm_warps * kWarp + lane;
        float squares = 0.0f;
        for (int vector = thread; vector < vectors; vector += threads) {
            const auto values =
                load_vector<kLinearLane>(x + row * args.x_stride + vector * kLinearLane);
            store_vector(rows + row * stride + vector * kLinearLane, values);
            squares += sum_of_squares<T>(values);
        }
        squares = warp_sum(squares);
        if (lane == 0) sums[row * kWarp + pair % norm_warps] = squares;
    }
    wait_copies<0>();  // of the norm's weight
    __syncthreads();
    for (int pair = warp; pair < args.m * norm_warps; pair += warps) {
        const int row = pair / norm_warps, thread = pair % norm_warps * kWarp + lane;
        float squares = 0.0f;
        for (int i = 0; i < norm_warps; ++i) squares += sums[row * kWarp + i];
        const float scale = inverse_rms(squares, args.k, args.epsilon);
        for (int vector = thread; vector < vectors; vector += threads) {
            T* place = rows + row * stride + vector * kLinearLane;
            auto values = load_vector<kLinearLane>(place);
            const auto weights = load_vector<kLinearLane>(norm_weight + vector * kLinearLane);
            normalize<T>(values, scale, weights, args.weight_offset);
            store_vector(place, values);
        }
    }
    __syncthreads();
}

// The weight's row that is row `i` of a tile's kRows. Rows beyond the last are read as the last,
// and not written.
template <typename T, int kRows>
__device__ inline const T* weight_row(const LinearRowsArgs& args, int tile, int i) {
    const int width = args.is_gated ? kRows / 2 : kRows;
    const bool is_up = i >= width;
    const int row = min(tile * width + (is_up ? i - width : i), args.n - 1);
    return static_cast<const T*>(args.weight) + (is_up ? row + args.n : row) * args.weight_stride;
}

// Stores the sums of a warp: those of mma_16x8x16 for each 16 tokens and 8 rows.
template <int kTiles, int kGroups>
__device__ inline void store_sums(const LinearRowsArgs& args, float* partial_sums,
                                  const float (&sums)[kTiles][kGroups][4]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int token = 16 * tile + 8 * part + g;
            if (token >= args.m) continue;
            float* to = partial_sums + (warp * args.m + token) * padded_row(8 * kGroups) + 2 * t;
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                const Vector<float, 2> pair{sums[tile][i][2 * part], sums[tile][i][2 * part + 1]};
                store_vector(to + 8 * i, pair);
            }
        }
    }
}

// Adds up what the warps have, and writes a tile's outputs.
template <typename T, int kRows>
__device__ void write_outputs(const LinearRowsArgs& args, int tile, const float* partial_sums) {
    const int warps = blockDim.x / kWarp;
    const T* bias = static_cast<const T*>(args.bias);
    const int width = args.is_gated ? kRows / 2 : kRows;  // outputs of the tile
    const int first = tile * width;
    for (int i = threadIdx.x; i < args.m * width; i += blockDim.x) {
        const int token = i / width, column = i % width, output = first + column;
        if (output >= args.n) continue;
        auto sum_of = [&](int row, int weight_row) {
            float sum = 0.0f;
            for (int warp = 0; warp < warps; ++warp) {
                sum += partial_sums[(warp * args.m + token) * padded_row(kRows) + row];
            }
            return bias ? sum + to_float(bias[weight_row]) : sum;
        };
        const float sum = sum_of(column, output);
        if (args.to_float32) {
            float value = sum;
            if (args.residual) {
                value +=
                    static_cast<const float*>(args.residual)[token * args.residual_stride + output];
            }
            static_cast<float*>(args.out)[token * args.out_stride + output] = value;
            continue;
        }
        T value = from_float<T>(sum);
        if (args.is_gated) {
            const T up = from_float<T>(sum_of(width + column, args.n + output));
            value = from_float<T>(activate<T>(args.activation, to_float(value)) * to_float(up));
        }
        if (args.residual) {
            const T* residual = static_cast<const T*>(args.residual);
            value = from_float<T>(to_float(value) +
                                  to_float(residual[token * args.residual_stride + output]));
        }
        static_cast<T*>(args.out)[token * args.out_stride + output] = value;
    }
}

// Copies the rows of x into shared memory.
template <typename T>
__device__ void copy_rows(const LinearRowsArgs& args, T* rows) {
    const T* x = static_cast<const T*>(args.x);
    const int vectors = args.k / kLinearLane;
    for (int i = threadIdx.x; i < args.m * vectors; i += blockDim.x) {
        const int row = i / vectors, at = i % vectors * kLinearLane;
        copy_async(rows + row * x_row_stride(args.k) + at, x + row * args.x_stride + at, true);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
}

// What the blocks along x of a grid of any size do together. kGroups: eights of weight rows of a
// tile. kOctets: eights of tokens, at least m / 8; 1 or 2. kDepth: chunks of weights in flight.
// kHoldX: x lies in shared memory meanwhile.
template <typename T, int kGroups, int kOctets, int kDepth, bool kHoldX>
__device__ __forceinline__ void linear_rows(const LinearRowsArgs& args) {
    constexpr int kRows = 8 * kGroups;
    unsigned char* shared = dynamic_shared<unsigned char>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int g = lane / 4, t = lane % 4;
    const int width = args.is_gated ? kRows / 2 : kRows;
    const int tiles = (args.n + width - 1) / width;
    const bool is_normed = args.norm_weight != nullptr;
    const LinearShared places =
        linear_shared(args.m, args.k, kRows, warps, kHoldX, kHoldX && is_normed);
    // Chunks of k, and turns of all warps at them.
    const int chunks = (args.k + kLinearChunk - 1) / kLinearChunk;
    const int turns = ((chunks + warps - 1) / warps + kDepth - 1) / kDepth * kDepth;

    // The weights are loaded kDepth turns ahead, over the end of a tile into the next.
    const T* weights[kGroups];
    int next_tile = blockIdx.x, next_turn = 0;
    auto point_at_tile = [&] {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            weights[i] = weight_row<T, kRows>(args, next_tile, 8 * i + g);
        }
    };
    uint4 w[kDepth][kGroups][2];
    auto load_weights = [&](int stage) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = (warp + next_turn * warps) * kLinearChunk + half * (kLinearChunk / 2) +
                           t * kLinearLane;
            const bool valid = at < args.k && next_tile < tiles;
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                w[stage][i][half] = valid ? load_streamed(weights[i] + at) : uint4{};
            }
        }
        if (++next_turn == turns) {
            next_turn = 0;
            next_tile += gridDim.x;
            point_at_tile();
        }
    };
    // Weights do not depend on the kernel before, so that they are asked for while it still runs.
    let_next_kernel_start();
    point_at_tile();
#pragma unroll
    for (int stage = 0; stage < kDepth; ++stage) load_weights(stage);

    const T* x = static_cast<const T*>(args.x);
    int64_t x_stride = args.x_stride;
    if constexpr (kHoldX) {
        T* rows = reinterpret_cast<T*>(shared);
        if (is_normed) {
            T* norm_weight = reinterpret_cast<T*>(shared + places.norm_weight);
            for (int i = threadIdx.x * kLinearLane; i < args.k; i += blockDim.x * kLinearLane) {
                copy_async(norm_weight + i, static_cast<const T*>(args.norm_weight) + i, true);
            }
            commit_copies();
            wait_for_previous_kernel();
            norm_rows<T>(args, rows, norm_weight,
                         reinterpret_cast<float*>(shared + places.norm_sums));
        } else {
            wait_for_previous_kernel();
            copy_rows<T>(args, rows);
        }
        x = rows;
        x_stride = x_row_stride(args.k);
    } else {
        wait_for_previous_kernel();
    }
    // Otherwise its fragments are loaded ahead as the weights are.
    constexpr int kDepthX = kHoldX ? 1 : kDepth;
    uint4 fragments[kDepthX][kOctets][2];
    auto load_x = [&](int stage, int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = chunk * kLinearChunk + half * (kLinearChunk / 2) + t * kLinearLane;
#pragma unroll
            for (int i = 0; i < kOctets; ++i) {
                const int token = 8 * i + g;
                fragments[stage][i][half] =
                    token < args.m && at < args.k
                        ? *reinterpret_cast<const uint4*>(x + token * x_stride + at)
                        : uint4{};
            }
        }
    };
    if constexpr (!kHoldX) {
#pragma unroll
        for (int stage = 0; stage < kDepth; ++stage) load_x(stage, warp + stage * warps);
    }

    float* partial_sums = reinterpret_cast<float*>(shared + places.partial_sums);
    for (int tile = blockIdx.x, parity = 0; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float sums[1][kGroups][4] = {};
        for (int turn = 0; turn < turns; turn += kDepth) {
#pragma unroll
            for (int stage = 0; stage < kDepth; ++stage) {
                const int chunk = warp + (turn + stage) * warps;
                if constexpr (kHoldX) load_x(0, chunk);
                const auto& from = fragments[kHoldX ? 0 : stage];
                if (chunk < chunks) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint4 top = from[0][half];
                        const uint4 bottom = kOctets > 1 ? from[kOctets - 1][half] : uint4{};
                        const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
                        const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
                        for (int i = 0; i < kGroups; ++i) {
                            const uint4 column = w[stage][i][half];
                            mma_16x8x16<T>(sums[0][i], first, {column.x, column.y});
                            mma_16x8x16<T>(sums[0][i], second, {column.z, column.w});
                        }
                    }
                }
                load_weights(stage);
                if constexpr (!kHoldX) {
                    const int ahead = turn + stage + kDepth;  // past the end: the next tile's
                    load_x(stage, warp + (ahead < turns ? ahead : ahead - turns) * warps);
                }
            }
        }
        // One tile's sums are written while the one's before may still be read.
        float* tile_sums = partial_sums + parity * (places.tile / sizeof(float));
        store_sums(args, tile_sums, sums);
        __syncthreads();
        write_outputs<T, kRows>(args, tile, tile_sums);
    }
}

// kBlocks: blocks that a multiprocessor has room for.
template <typename T, int kGroups, int kOctets, int kDepth, bool kHoldX, int kMostWarps,
          int kBlocks>
__global__ void __launch_bounds__(kMostWarps* kWarp, kBlocks)
    linear_rows_kernel(LinearRowsArgs args) {
    linear_rows<T, kGroups, kOctets, kDepth, kHoldX>(args);
}

}  // namespace sglite::cuda
