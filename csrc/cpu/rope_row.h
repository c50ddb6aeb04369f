// Rotary position embedding (Su et al., 2021), in place: every pair of channels (a, b) becomes
// (a cos - b sin, b cos + a sin). Arithmetic is float32, with products and sums rounded one by one,
// as torch does it; the result is rounded once to the tensors' own type.
#pragma once

#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

static inline void rotate(Vec& a, Vec& b, Vec cosine, Vec sine) {
    const Vec first = a;
    a = a * cosine - b * sine;
    b = b * cosine + first * sine;
}

// Pairs (i, i + half).
template <typename T>
static inline void rotate_halves(T* x, const float* cosines, const float* sines, int64_t half) {
    int64_t i = 0;
    for (; i + Vec::kSize <= half; i += Vec::kSize) {
        Vec a = load(x + i), b = load(x + half + i);
        rotate(a, b, load(cosines + i), load(sines + i));
        store(x + i, a);
        store(x + half + i, b);
    }
    if (i < half) {
        const int rest = static_cast<int>(half - i);
        Vec a = load_partial(x + i, rest), b = load_partial(x + half + i, rest);
        rotate(a, b, load_partial(cosines + i, rest), load_partial(sines + i, rest));
        store_partial(x + i, a, rest);
        store_partial(x + half + i, b, rest);
    }
}

// Pairs (2i, 2i + 1).
template <typename T>
static inline void rotate_pairs(T* x, const float* cosines, const float* sines, int64_t half) {
    float first[Vec::kSize], second[Vec::kSize];
    for (int64_t i = 0; i < half; i += Vec::kSize) {
        const int count = static_cast<int>(half - i < Vec::kSize ? half - i : Vec::kSize);
        for (int lane = 0; lane < Vec::kSize; ++lane) {
            const bool inside = lane < count;
            first[lane] = inside ? to_float(x[2 * (i + lane)]) : 0.0f;
            second[lane] = inside ? to_float(x[2 * (i + lane) + 1]) : 0.0f;
        }
        Vec a = load(first), b = load(second);
        rotate(a, b, load_partial(cosines + i, count), load_partial(sines + i, count));
        store(first, a);
        store(second, b);
        for (int lane = 0; lane < count; ++lane) {
            x[2 * (i + lane)] = from_float<T>(first[lane]);
            x[2 * (i + lane) + 1] = from_float<T>(second[lane]);
        }
    }
}

// cos_sin: a row of the table, cosines and then sines of `half` pairs.
template <typename T>
static inline void rotate_head(T* x, const float* cos_sin, int64_t half, bool interleaved) {
    if (interleaved) {
        rotate_pairs(x, cos_sin, cos_sin + half, half);
    } else {
        rotate_halves(x, cos_sin, cos_sin + half, half);
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
