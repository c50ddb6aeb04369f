// Vectors whose lanes are pairs of bfloat16, for AVX2, which knows no other arithmetic on them than
// to take them apart.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace sglite::cpu::SGLITE_CPU_PATH {

// The first of each pair, and the second.
static inline Vec first_of_pairs(Vec pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))};
}
// Given the first, whose lower halves are zeros, it takes neither a constant nor another register.
static inline Vec second_of_pairs(Vec pairs, Vec first) {
    return {_mm256_castsi256_ps(
        _mm256_blend_epi16(_mm256_castps_si256(first.v), _mm256_castps_si256(pairs.v), 0xaa))};
}
// 16 floats in memory as two vectors of those with even and those with odd numbers, and back.
static inline void load_alternating(const float* p, Vec& even, Vec& odd) {
    const __m256 low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + 8);
    const auto order = [](__m256 a) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
    };
    even.v = order(_mm256_shuffle_ps(low, high, 0x88));
    odd.v = order(_mm256_shuffle_ps(low, high, 0xdd));
}
static inline void store_alternating(float* p, Vec even, Vec odd) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v);
    const __m256 high = _mm256_unpackhi_ps(even.v, odd.v);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

// 8 channels of 8 rows in memory, row i at base + offsets[i] in bytes, two by two as 4 vectors
// whose lanes are the rows, `stride` floats apart. Pairs of channels stay together, which halves
// the shuffling.
static inline void transpose_pairs(const char* base, const int64_t* offsets, float* pairs,
                                   int64_t stride) {
    const auto load_half = [&](int row) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(base + offsets[row]));
    };
    __m256 quarters[4], halves[4];
    for (int i = 0; i < 4; ++i) {
        quarters[i] =
            _mm256_insertf128_ps(_mm256_castps128_ps256(load_half(i)), load_half(i + 4), 1);
    }
    for (int i = 0; i < 4; i += 2) {
        halves[i] = _mm256_unpacklo_ps(quarters[i], quarters[i + 1]);
        halves[i + 1] = _mm256_unpackhi_ps(quarters[i], quarters[i + 1]);
    }
    for (int j = 0; j < 2; ++j) {
        _mm256_storeu_ps(pairs + 2 * j * stride, _mm256_shuffle_ps(halves[j], halves[2 + j], 0x44));
        _mm256_storeu_ps(pairs + (2 * j + 1) * stride,
                         _mm256_shuffle_ps(halves[j], halves[2 + j], 0xee));
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH

#endif
