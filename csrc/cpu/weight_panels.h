// How weights of linear layers lie in memory. A weight [N, K] is cut into panels of 32 rows (32
// output columns). A panel is a list of steps; a step holds, for each of its 32 columns, one 32-bit
// word: a float32, or the 16-bit elements of two neighbouring k. So storage is [N/32][K][32] for
// float32 and [N/32][K/2][32][2] for 16-bit types, with N and K padded by zeros to whole panels
// and steps. A kernel reads a panel front to back, which is what memory is fastest at.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/path.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

constexpr int kPanelColumns = 32;

// How many bytes ahead of what it multiplies a kernel fetches a panel for a row or two, which take
// longer to read than to multiply. The processor's own prefetch stops where a page of 4 KiB ends: a
// Zen 3 reads 5 to 12 % faster so, while a Zen 4, with AVX-512, does not. 0: not at all.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kNearDistance = 1024;
#else
constexpr int64_t kNearDistance = 0;
#endif

// Values of k in one step.
template <typename T>
constexpr int kStepDepth = sizeof(uint32_t) / sizeof(T);

template <typename T>
static inline int64_t steps_of(int64_t k) {
    return (k + kStepDepth<T> - 1) / kStepDepth<T>;
}
static inline int64_t panels_of(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }

// Vectors of words, moved bit for bit.
constexpr int kSquare = Vec::kSize;
static_assert(kPanelColumns % kSquare == 0);

static inline Vec load_words(const void* p) {
    Vec words;
    std::memcpy(&words.v, p, sizeof words.v);
    return words;
}
static inline void store_words(void* p, Vec words) { std::memcpy(p, &words.v, sizeof words.v); }

// One step of one row as a word; a 16-bit row of odd length ends in half a word.
template <typename T>
static inline uint32_t word_at(const T* row, int64_t step, int64_t k) {
    uint32_t word = 0;
    const int64_t first = step * kStepDepth<T>;
    if (first + kStepDepth<T> <= k) {
        std::memcpy(&word, row + first, sizeof word);
    } else {
        std::memcpy(&word, row + first, sizeof(T));
    }
    return word;
}

// Writes the steps [begin, end) of one panel to `panel` ([end - begin][32] words), from 32 rows of
// length k. A null row stands for zeros. What lies `distance` elements further on, where the next
// panel's rows are, is fetched into the cache meanwhile: a processor hardly follows 16 streams.
template <typename T>
static void fill_panel(uint32_t* panel, const T* const* rows, int64_t begin, int64_t end, int64_t k,
                       int64_t distance) {
    const int64_t whole_steps = k / kStepDepth<T> < end ? k / kStepDepth<T> : end;
    const int64_t squares = whole_steps > begin ? (whole_steps - begin) / kSquare : 0;
    for (int column = 0; column < kPanelColumns; column += kSquare) {
        for (int64_t square = 0; square < squares; ++square) {
            const int64_t step = begin + square * kSquare;
            uint32_t* block = panel + square * kSquare * kPanelColumns + column;
            Vec words[kSquare];
#pragma GCC unroll 16
            for (int i = 0; i < kSquare; ++i) {
                words[i] = splat(0.0f);
                if (!rows[column + i]) continue;
                const T* row = rows[column + i] + step * kStepDepth<T>;
                __builtin_prefetch(row + distance, 0, 2);
                words[i] = load_words(row);
            }
            transpose(words);
#pragma GCC unroll 16
            for (int i = 0; i < kSquare; ++i) store_words(block + i * kPanelColumns, words[i]);
        }
    }
    int64_t step = begin + squares * kSquare;
    for (; step < end; ++step) {
        uint32_t* line = panel + (step - begin) * kPanelColumns;
        for (int column = 0; column < kPanelColumns; ++column) {
            line[column] = rows[column] ? word_at(rows[column], step, k) : 0;
        }
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
