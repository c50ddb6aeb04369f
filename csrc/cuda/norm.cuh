// RMSNorm's arithmetic, so that a norm fused into another kernel gives the bits of the norm alone.
#pragma once

#include "cuda/primitives.cuh"

namespace sglite::cuda {

// Threads that share a row of so many vectors of kWidth elements; thread i takes vectors i,
// i + threads and so on.
inline __host__ __device__ int norm_threads(int64_t vectors) {
    int threads = kWarp;
    while (threads < 1024 && threads < vectors) threads *= 2;
    return threads;
}

// Adds the squares of a vector to a thread's sum.
template <typename T, int kWidth>
__device__ inline float add_squares(float sum, const Vector<T, kWidth>& values) {
    for (int i = 0; i < kWidth; ++i) {
        const float value = to_float(values[i]);
        sum = fmaf(value, value, sum);
    }
    return sum;
}

// The factor on a row, from the warps' sums of squares, of which lane sums went into each.
__device__ inline float norm_scale(const float* warp_sums, int warps, int64_t width,
                                   float epsilon) {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) sum += warp_sums[warp];
    return 1.0f / sqrtf(sum / static_cast<float>(width) + epsilon);
}

// Rounded before the product with the weight, where Hugging Face rounds.
template <typename T>
__device__ inline T apply_norm(float value, float scale, T weight, float weight_offset) {
    const float normed = to_float(from_float<T>(value * scale));
    return from_float<T>(normed * (to_float(weight) + weight_offset));
}

}  // namespace sglite::cuda
