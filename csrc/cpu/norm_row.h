// RMSNorm of one row.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// The sum of squares of a row.
template <typename T>
static inline float sum_squares(const T* x, int64_t width) {
    Vec squares = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize) {
        const Vec value = load(x + i);
        squares = fma(value, value, squares);
    }
    if (i < width) {
        const Vec value = load_partial(x + i, static_cast<int>(width - i));
        squares = fma(value, value, squares);
    }
    return reduce_sum(squares);
}

static inline float norm_scale(float squares, int64_t width, float epsilon) {
    return 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
}

// out = x * scale, rounded, * (weight + weight_offset), rounded; out may be x.
template <typename T>
static inline void norm_row(T* out, const T* x, const T* weight, int64_t width, float scale,
                            float weight_offset) {
    int64_t i = 0;
    for (; i + Vec::kSize <= width; i += Vec::kSize) {
        const Vec normed = round_to<T>(load(x + i) * splat(scale));
        store(out + i, normed * (load(weight + i) + splat(weight_offset)));
    }
    for (; i < width; ++i) {
        const float normed = to_float(from_float<T>(to_float(x[i]) * scale));
        out[i] = from_float<T>(normed * (to_float(weight[i]) + weight_offset));
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
