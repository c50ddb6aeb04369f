// Transposing a square of 32-bit lanes: lane j of vector i becomes lane i of vector j.
#pragma once

#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

#if defined(__AVX512F__)

static inline void transpose(Vec (&rows)[16]) {
    __m512 pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    // quads[4 * k + j] holds column j of every 128-bit quarter, of rows 4k to 4k + 3.
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(pairs[i + j]);
            const __m512d high = _mm512_castps_pd(pairs[i + 2 + j]);
            quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const __m512 low01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x44);
        const __m512 high01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xee);
        const __m512 low23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xee);
        rows[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
        rows[4 + j].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        rows[8 + j].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
        rows[12 + j].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
}

#elif defined(__AVX2__)

static inline void transpose(Vec (&rows)[8]) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    }
    for (int j = 0; j < 4; ++j) {
        rows[j].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
        rows[4 + j].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
    }
}

#else

static inline void transpose(Vec (&rows)[Vec::kSize]) {
    for (int i = 0; i < Vec::kSize; ++i) {
        for (int j = 0; j < i; ++j) {
            const float lane = rows[i].v[j];
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = lane;
        }
    }
}

#endif

}  // namespace sglite::cpu::SGLITE_CPU_PATH
