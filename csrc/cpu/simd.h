// Vectors of float32 for the path being compiled, and their loads and stores from every element
// type. Arithmetic is float32 whatever the storage; `round_to<T>` rounds as storing would.
// Reductions add in a fixed tree order.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/path.h"
#include "tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sglite::cpu::SGLITE_CPU_PATH {

// Rounds to nearest even; a NaN stays a NaN.
static inline BFloat16 to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

static inline float to_float(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
#if defined(__x86_64__) && !defined(__F16C__)
// The compiler would call a function of its own library for each element.
static inline float to_float(Float16 value) {
    uint16_t half;
    std::memcpy(&half, &value, sizeof half);
    uint32_t bits = (half & 0x7fffu) << 13;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;  // the exponent's bias is 127 instead of 15
    std::memcpy(&bits, &result, sizeof bits);
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    bits |= (half & 0x8000u) << 16;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
#else
static inline float to_float(Float16 value) { return static_cast<float>(value); }
#endif
static inline float to_float(float value) { return value; }

template <typename T>
static inline T from_float(float value) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return to_bfloat16(value);
    } else {
        return static_cast<T>(value);
    }
}

#if defined(__AVX512F__)

struct Vec {
    static constexpr int kSize = 16;
    __m512 v;
};

static inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec lane_numbers() {
    return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline void store(BFloat16* p, Vec a) {
    const __m256bh half = _mm512_cvtneps_pbh(a.v);
    std::memcpy(p, &half, sizeof half);
}
static inline void store(Float16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <typename T>
static inline Vec round_to(Vec a) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        const __m256i half = std::bit_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    } else if constexpr (std::is_same_v<T, Float16>) {
        return {
            _mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
    } else {
        return a;
    }
}
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// Where a < b the lane of `yes`, elsewhere (a NaN included) that of `no`.
static inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
static inline Vec round_to_int(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole numbers n between -126 and 127; here for others too.
static inline Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

#elif defined(__AVX2__)

struct Vec {
    static constexpr int kSize = 8;
    __m256 v;
};

static inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec lane_numbers() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
static inline Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
// Bits of which the upper half is a, rounded to bfloat16; the lower half is anything.
static inline __m256i bfloat16_bits(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_add_epi32(bits, bias)),
                                                _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                                nan));
}
static inline void store(BFloat16* p, Vec a) {
    const __m256i rounded = _mm256_srli_epi32(bfloat16_bits(a), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline void store(Float16* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <typename T>
static inline Vec round_to(Vec a) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        return {_mm256_castsi256_ps(_mm256_and_si256(bfloat16_bits(a), upper))};
    } else if constexpr (std::is_same_v<T, Float16>) {
        return {
            _mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
    } else {
        return a;
    }
}
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
static inline Vec round_to_int(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec scale_by_power_of_two(Vec a, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

#else

struct Vec {
    static constexpr int kSize = 8;
    float v[kSize];
};

template <typename Lane>
static inline Vec make_lanes(Lane&& lane) {
    Vec result;
    for (int i = 0; i < Vec::kSize; ++i) result.v[i] = lane(i);
    return result;
}
static inline Vec splat(float x) {
    return make_lanes([&](int) { return x; });
}
static inline Vec lane_numbers() {
    return make_lanes([](int i) { return static_cast<float>(i); });
}
template <typename T>
static inline Vec load(const T* p) {
    return make_lanes([&](int i) { return to_float(p[i]); });
}
template <typename T>
static inline void store(T* p, Vec a) {
    for (int i = 0; i < Vec::kSize; ++i) p[i] = from_float<T>(a.v[i]);
}
template <typename T>
static inline Vec round_to(Vec a) {
    return make_lanes([&](int i) { return to_float(from_float<T>(a.v[i])); });
}
static inline Vec operator+(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] + b.v[i]; });
}
static inline Vec operator-(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
static inline Vec operator*(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] * b.v[i]; });
}
static inline Vec operator/(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] / b.v[i]; });
}
static inline Vec fma(Vec a, Vec b, Vec c) {
    return make_lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline Vec max(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline Vec min(Vec a, Vec b) {
    return make_lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return make_lanes([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
static inline Vec round_to_int(Vec a) {
    return make_lanes([&](int i) { return std::nearbyint(a.v[i]); });
}
static inline Vec scale_by_power_of_two(Vec a, Vec n) {
    return make_lanes([&](int i) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return a.v[i] * power;
    });
}

#endif

// The first `count` lanes (fewer than Vec::kSize) from memory, `fill` in the others.
template <typename T>
static inline Vec load_partial(const T* p, int count, float fill = 0.0f) {
    float lanes[Vec::kSize];
    for (int i = 0; i < Vec::kSize; ++i) lanes[i] = i < count ? to_float(p[i]) : fill;
    return load(lanes);
}

template <typename T>
static inline void store_partial(T* p, Vec a, int count) {
    T lanes[Vec::kSize];
    store(lanes, a);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

#if defined(__AVX512F__)
static inline void store_partial(float* p, Vec a, int count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << count) - 1), a.v);
}
#endif

// Halves are combined until one lane is left.
template <typename Combine>
static inline float reduce(Vec a, Combine&& combine) {
    float lanes[Vec::kSize];
    store(lanes, a);
    for (int half = Vec::kSize / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
    }
    return lanes[0];
}
#if defined(__AVX512F__)
static inline float reduce_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
static inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
#elif defined(__AVX2__)
static inline float reduce_sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline float reduce_max(Vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#else
static inline float reduce_sum(Vec a) {
    return reduce(a, [](float x, float y) { return x + y; });
}
static inline float reduce_max(Vec a) {
    return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
#endif

// e^x to about 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor
// polynomial of e^r. Below -87.3 the result is 0; above 88.3 it saturates; a NaN stays a NaN, which
// min and max hand on when it is their second operand.
static inline Vec exp(Vec x) {
    const Vec clamped = min(splat(88.3f), max(splat(-87.3f), x));
    const Vec n = round_to_int(clamped * splat(1.44269504088896341f));
    // ln 2 in two parts keeps r exact.
    Vec r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.0f / 5040.0f);
    for (float coefficient :
         {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
        p = fma(p, r, splat(coefficient));
    }
    return select_less(x, splat(-87.3f), splat(0.0f), scale_by_power_of_two(p, n));
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
