// The arithmetic of RMSNorm, shared by the kernels that normalise, so that they give the same bits.
//
// A row is dealt out in chunks of 16 bytes. Its sum of squares is one sum for each chunk, from the
// first element to the last, and then a tree over the chunks; how a row is loaded changes nothing.
#pragma once

#include "cuda/primitives.cuh"

namespace sglite::cuda {

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <typename T>
using Chunk = Vector<T, kChunk<T>>;

constexpr int kMostNormThreads = 1024;

// Threads that share a row of so many chunks; thread i takes chunks i, i + threads and so on. Up to
// two chunks for each lane, one warp does.
inline __host__ __device__ int norm_threads(int64_t chunks) {
    if (chunks <= 2 * kWarp) return kWarp;
    const int64_t threads = (chunks + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(threads < kMostNormThreads ? threads : kMostNormThreads);
}

// The chunk from element `start` of a row on; zeros beyond the row's end.
template <bool kAligned, typename T>
__device__ inline Chunk<T> load_chunk(const T* row, int64_t start, int64_t width) {
    if constexpr (kAligned) {
        return load_vector<kChunk<T>>(row + start);
    } else {
        Chunk<T> chunk;
        for (int j = 0; j < kChunk<T>; ++j) {
            chunk[j] = start + j < width ? row[start + j] : from_float<T>(0.0f);
        }
        return chunk;
    }
}
template <bool kAligned, typename T>
__device__ inline void store_chunk(T* row, int64_t start, int64_t width, const Chunk<T>& chunk) {
    if constexpr (kAligned) {
        store_vector(row + start, chunk);
    } else {
        for (int j = 0; j < kChunk<T>; ++j) {
            if (start + j < width) row[start + j] = chunk[j];
        }
    }
}

template <typename T>
__device__ inline float sum_of_squares(const Vector<T, kChunk<T>>& chunk) {
    float sum = 0.0f;
    for (int j = 0; j < kChunk<T>; ++j) {
        const float value = to_float(chunk[j]);
        sum = fmaf(value, value, sum);
    }
    return sum;
}

// The sum over each group of `lanes` neighbouring lanes (a power of two), the same in all of them.
__device__ inline float group_sum(float value, int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

__device__ inline float inverse_rms(float squares, int64_t width, float epsilon) {
    return 1.0f / sqrtf(squares / static_cast<float>(width) + epsilon);
}

template <typename T>
__device__ inline void normalize(Chunk<T>& x, float scale, const Chunk<T>& weight,
                                 float weight_offset) {
    for (int j = 0; j < kChunk<T>; ++j) {
        // Rounded before the product, where Hugging Face rounds.
        const float normed = to_float(from_float<T>(to_float(x[j]) * scale));
        x[j] = from_float<T>(normed * (to_float(weight[j]) + weight_offset));
    }
}

}  // namespace sglite::cuda
