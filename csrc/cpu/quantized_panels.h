// How quantised weights lie in memory, and how the inner loops read them. As in weight_panels.h a
// panel is 32 rows of the weight (32 output columns), read front to back, but a step holds 8 values
// of k: 8 bits are [N/32][K/8][8][32] signed bytes, 4 bits [N/32][K/8][32] words of 8 unsigned
// nibbles (the value + 8). In a word even k are the nibbles of the low half, odd k those of the
// high half, so that each 16-bit half holds one of two neighbouring k. N and K are padded to whole
// panels and steps by codes that stand for zero. Scales, and zero points where there are some, are
// [N/32][groups][32] beside the panels.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/path.h"
#include "cpu/simd.h"
#include "cpu/weight_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

constexpr int kQuantizedDepth = 8;  // values of k in a step

// Where the nibble of one k of a step lies in its word, counted in nibbles.
constexpr int nibble_position(int part) { return part % 2 * 4 + part / 2; }

// Signed bytes as float32.
static inline Vec load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
#else
    return make_lanes([&](int i) { return static_cast<float>(p[i]); });
#endif
}

// What each kind of storage gives the inner loops:
//   value<part>(step, column)  float32 of one k of a step, for a vector of columns from `column` on
//   pair<part>(step, column)   two neighbouring k as bfloat16 words, where there are dot products
//   kStepBytes                 of one step of a panel
//   kOffset                    how much a value is above the code that it stands for
//   row_factor(part)           a power of two by which x of one k is multiplied, since value<part>
//                              is too large by its inverse; 1 with pairs
//   code(step, part, column)   the code of one element

struct Int8Codes {
    static constexpr int64_t kStepBytes = kQuantizedDepth * kPanelColumns;
    static constexpr float kOffset = 0.0f;
    static constexpr float row_factor(int) { return 1.0f; }

    template <int kPart>
    static Vec value(const uint8_t* step, int column) {
        return load_bytes(reinterpret_cast<const int8_t*>(step) + kPart * kPanelColumns + column);
    }
#if defined(__AVX512BF16__)
    // Whole numbers of 8 bits are bfloat16 with nothing below the upper half of a float32.
    template <int kPart>
    static __m512i pair(const uint8_t* step, int column) {
        const __m512i even = _mm512_castps_si512(value<2 * kPart>(step, column).v);
        const __m512i odd = _mm512_castps_si512(value<2 * kPart + 1>(step, column).v);
        return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
    }
#endif
    static float code(const uint8_t* step, int part, int column) {
        return static_cast<float>(
            reinterpret_cast<const int8_t*>(step)[part * kPanelColumns + column]);
    }
};

struct Int4Codes {
    static constexpr int64_t kStepBytes = sizeof(uint32_t) * kPanelColumns;

    static const uint32_t* words(const uint8_t* step, int column) {
        return reinterpret_cast<const uint32_t*>(step) + column;
    }

#if defined(__AVX512F__)
    static constexpr float kOffset = 0.0f;
    static constexpr float row_factor(int) { return 1.0f; }

    // A permutation looks only at the low four bits of an index.
    template <int kPart>
    static Vec value(const uint8_t* step, int column) {
        const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i word = _mm512_loadu_si512(words(step, column));
        return {_mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * nibble_position(kPart)), table)};
    }
#elif defined(__AVX2__)
    // A nibble is converted where it lies, 16^position times too large, without a shift, and
    // without the subtraction that would make it signed: x and its sums make up for both.
    static constexpr float kOffset = 8.0f;
    static constexpr float row_factor(int part) {
        const int position = nibble_position(part);
        return position == 7 ? 1.0f : 1.0f / static_cast<float>(1 << (4 * position));
    }

    template <int kPart>
    static Vec value(const uint8_t* step, int column) {
        constexpr int kPosition = nibble_position(kPart);
        const __m256i word =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words(step, column)));
        // The uppermost nibble would be taken for a sign.
        const __m256i nibble = kPosition == 7
                                   ? _mm256_srli_epi32(word, 28)
                                   : _mm256_and_si256(word, _mm256_set1_epi32(15 << 4 * kPosition));
        return {_mm256_cvtepi32_ps(nibble)};
    }
#else
    static constexpr float kOffset = 0.0f;
    static constexpr float row_factor(int) { return 1.0f; }

    template <int kPart>
    static Vec value(const uint8_t* step, int column) {
        return make_lanes([&](int i) { return code(step, kPart, column + i); });
    }
#endif
#if defined(__AVX512BF16__)
    // A permutation of 16-bit lanes looks at five bits of an index; the table stands there twice.
    template <int kPart>
    static __m512i pair(const uint8_t* step, int column) {
        alignas(32) static constexpr uint16_t kTable[16] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        const __m512i table =
            _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kTable)));
        const __m512i word = _mm512_loadu_si512(words(step, column));
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * kPart), table);
    }
#endif
    static float code(const uint8_t* step, int part, int column) {
        uint32_t word;
        std::memcpy(&word, words(step, column), sizeof word);
        return static_cast<float>(static_cast<int>(word >> (4 * nibble_position(part)) & 15) - 8);
    }
};

// Values that another storage gave, written out for many rows of x: [k][32] float32.
struct FloatPiece {
    static constexpr int64_t kStepBytes = kQuantizedDepth * kPanelColumns * sizeof(float);

    template <int kPart>
    static Vec value(const uint8_t* step, int column) {
        return load(reinterpret_cast<const float*>(step) + kPart * kPanelColumns + column);
    }
};

#if defined(__AVX512BF16__)
// The same as pairs: [k/2][32] words.
struct PairPiece {
    static constexpr int64_t kStepBytes = kQuantizedDepth / 2 * kPanelColumns * sizeof(uint32_t);

    template <int kPart>
    static __m512i pair(const uint8_t* step, int column) {
        return _mm512_loadu_si512(reinterpret_cast<const uint32_t*>(step) + kPart * kPanelColumns +
                                  column);
    }
};
#endif

static inline int64_t quantized_steps_of(int64_t k) {
    return (k + kQuantizedDepth - 1) / kQuantizedDepth;
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
