// The inner loops of the linear layer: a few rows of x times one or two panels of weights, float32
// sums in registers. Every element of the result is one chain of additions over ascending k,
// whatever the number of rows or panels, which is what makes a row's bits independent of its batch.
#pragma once

#include "cpu/simd.h"
#include "cpu/weight_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Vectors that the registers hold, rows of x that are multiplied at once, rows up to which two
// panels are taken at once, and rows from which on weights are fetched ahead: where arithmetic is
// long enough for the processor's own prefetch to fall behind, or a panel is read in two passes.
#if defined(__AVX512F__)
constexpr int kRegisters = 32, kMaxRows = 12, kMaxPairRows = 7, kMinPrefetchRows = 5;
#elif defined(__AVX2__)
constexpr int kRegisters = 16, kMaxRows = 6, kMaxPairRows = 0, kMinPrefetchRows = 3;
#else
constexpr int kRegisters = 8, kMaxRows = 4, kMaxPairRows = 0, kMinPrefetchRows = 3;
#endif

// Rows that fill the registers best, after kMaxRows: fewer than vectors, so that their values are
// kept while weights come one after the other. 0: none.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kKeptRows = 3;
#else
constexpr int kKeptRows = 0;
#endif

// Steps of a panel that all rows are multiplied by before the next ones are read, from as many rows
// on as take more than one pass over them: so they come from memory once and then from the nearest
// cache. Sums are fetched and stored each time, hence the longer passes of many blocks of rows,
// whose weights need not come fast: from the second cache, if there are so many steps.
#if defined(__AVX512F__)
constexpr int64_t kPassSteps = 96, kLongPassSteps = 1024, kLongPassBlocks = 8;
constexpr int64_t kMinPassRows = kMaxRows + 1;
#else
constexpr int64_t kPassSteps = 64, kLongPassSteps = 128, kLongPassBlocks = 6;
constexpr int64_t kMinPassRows = kMinPrefetchRows;
#endif

// How x is laid out for the inner loops: a block of R rows is [steps][kPerStep][R] elements. With
// bfloat16 dot products an element is a word of two neighbouring k, otherwise a float32.
template <typename T>
struct RowLayout {
    using Element = float;
    static constexpr int kPerStep = kStepDepth<T>;
};
#if defined(__AVX512BF16__)
template <>
struct RowLayout<BFloat16> {
    using Element = uint32_t;
    static constexpr int kPerStep = 1;
};
#endif

template <typename T>
using RowElement = typename RowLayout<T>::Element;

// The weights of one vector of columns for one k of a step, which starts at p.
template <int kPart>
static inline Vec load_step(const float* p) {
    return load(p);
}

#if defined(__AVX512F__)
template <int kPart>
static inline Vec load_step(const BFloat16* p) {
    const __m512i words = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(
        kPart ? _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000)))
              : _mm512_slli_epi32(words, 16))};
}
template <int kPart>
static inline Vec load_step(const Float16* p) {
    const __m512i every_second =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i index = _mm512_add_epi32(every_second, _mm512_set1_epi32(kPart));
    return {_mm512_permutex2var_ps(load(p).v, index, load(p + Vec::kSize).v)};
}
#elif defined(__AVX2__)
template <int kPart>
static inline Vec load_step(const BFloat16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(
        kPart ? _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
              : _mm256_slli_epi32(words, 16))};
}
template <int kPart>
static inline Vec load_step(const Float16* p) {
    const __m256 mixed = _mm256_shuffle_ps(load(p).v, load(p + Vec::kSize).v, kPart ? 0xdd : 0x88);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8))};
}
#else
template <int kPart, typename T>
static inline Vec load_step(const T* p) {
    return make_lanes([&](int i) { return to_float(p[2 * i + kPart]); });
}
#endif

// Weights to fetch into the cache along the way: at each step the next `advance` bytes, at most
// 128, in each of the panels being read. A null address fetches nothing.
struct Prefetch {
    const char* address = nullptr;
    int64_t advance = 0;

    template <int kPanels>
    void step(int64_t panel_words) {
        if (!address) return;
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel) {
            const char* line = address + panel * panel_words * 4;
            __builtin_prefetch(line);
            __builtin_prefetch(line + advance / 2);
        }
        address += advance;
    }
};

// The most vectors of columns, a power of two, whose sums and weights (or values) fit the
// registers.
constexpr int vectors_at_once(int rows, int panels) {
    int vectors = panels * kPanelColumns / Vec::kSize;
    const auto registers = [&] {
        return rows * vectors + (rows == kKeptRows ? rows : vectors) + 1;
    };
    while (vectors > 1 && registers() > kRegisters) vectors /= 2;
    return vectors;
}

// sums[v] += value * weights[v].
template <int kVectors>
static inline void add_products(Vec (&sums)[kVectors], const float* value,
                                const Vec (&weights)[kVectors]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Written out, since sums, weights and value take all registers, and the compiler, which likes
    // to begin several values at a time, would move sums to memory and back.
    if constexpr (kVectors == 2) {
        __m256 factor, first = sums[0].v, second = sums[1].v;
        asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
            : "+x"(first), "+x"(second), "=&x"(factor)
            : "m"(*value), "x"(weights[0].v), "x"(weights[1].v));
        sums[0].v = first;
        sums[1].v = second;
        return;
    }
#endif
    const Vec factor = splat(*value);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[v] = fma(factor, weights[v], sums[v]);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// sums[row][v] += values[row] * the weights of vector v, which start at weights[v] + offset.
// Written out for the same reason, a vector's weights never being known before the last one's are
// used up.
template <typename T, int kPart, int kVectors>
static inline void add_kept_products(Vec (&sums)[kKeptRows][kVectors], const float* values,
                                     const uint32_t* const (&weights)[kVectors], int64_t offset) {
    using Words = const uint32_t[Vec::kSize];
    alignas(32) static constexpr Words kMask = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
    const __m256 x0 = splat(values[0]).v, x1 = splat(values[1]).v, x2 = splat(values[2]).v;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
        Words& words = *reinterpret_cast<Words*>(weights[v] + offset);
        __m256 sum0 = sums[0][v].v, sum1 = sums[1][v].v, sum2 = sums[2][v].v, weight;
#define SGLITE_ADD_PRODUCTS \
    "\n\tvfmadd231ps %3, %4, %0\n\tvfmadd231ps %3, %5, %1\n\tvfmadd231ps %3, %6, %2"
        if constexpr (std::is_same_v<T, Float16>) {
            weight = load_step<kPart>(reinterpret_cast<const T*>(words)).v;
            asm(SGLITE_ADD_PRODUCTS
                : "+x"(sum0), "+x"(sum1), "+x"(sum2)
                : "x"(weight), "x"(x0), "x"(x1), "x"(x2));
        } else if constexpr (std::is_same_v<T, float>) {
            asm("vmovups %7, %3" SGLITE_ADD_PRODUCTS
                : "+x"(sum0), "+x"(sum1), "+x"(sum2), "=&x"(weight)
                : "x"(x0), "x"(x1), "x"(x2), "m"(words));
        } else if constexpr (kPart == 0) {
            asm("vmovups %7, %3\n\tvpslld $16, %3, %3" SGLITE_ADD_PRODUCTS
                : "+x"(sum0), "+x"(sum1), "+x"(sum2), "=&x"(weight)
                : "x"(x0), "x"(x1), "x"(x2), "m"(words));
        } else {
            asm("vmovaps %8, %3\n\tvandps %7, %3, %3" SGLITE_ADD_PRODUCTS
                : "+x"(sum0), "+x"(sum1), "+x"(sum2), "=&x"(weight)
                : "x"(x0), "x"(x1), "x"(x2), "m"(words), "m"(kMask));
        }
#undef SGLITE_ADD_PRODUCTS
        sums[0][v].v = sum0;
        sums[1][v].v = sum1;
        sums[2][v].v = sum2;
    }
}
#endif

// tile[r][c] = sum over k of x[r][k] * weight[c][k], added to what tile holds where `resume`.
// x: one block in RowLayout. panel: kPanels panels, panel_words apart. tile: [kRows][32 * kPanels].
template <typename T, int kRows, int kPanels>
static void multiply(const RowElement<T>* x, const uint32_t* panel, int64_t panel_words,
                     int64_t steps, float* tile, bool resume, Prefetch prefetch) {
    constexpr int kTileColumns = kPanels * kPanelColumns;
    constexpr int kVectors = vectors_at_once(kRows, kPanels);
    for (int first = 0; first < kTileColumns; first += kVectors * Vec::kSize) {
        const uint32_t* weights[kVectors];
        Vec sums[kRows][kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
            const int column = first + v * Vec::kSize;
            weights[v] = panel + column / kPanelColumns * panel_words + column % kPanelColumns;
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                sums[row][v] = resume ? load(tile + row * kTileColumns + column) : splat(0.0f);
            }
        }
        const RowElement<T>* values = x;
        const auto add_part = [&]<int kPart>(int64_t step) {
#if defined(__AVX2__) && !defined(__AVX512F__)
            if constexpr (kRows == kKeptRows) {
                add_kept_products<T, kPart>(sums, values, weights, step * kPanelColumns);
                values += kRows;
                return;
            }
#endif
            Vec loaded[kVectors];
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
                loaded[v] =
                    load_step<kPart>(reinterpret_cast<const T*>(weights[v] + step * kPanelColumns));
            }
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                add_products(sums[row], values + row, loaded);
            }
            values += kRows;
        };
        for (int64_t step = 0; step < steps; ++step) {
            prefetch.step<kPanels>(panel_words);
            add_part.template operator()<0>(step);
            if constexpr (kStepDepth<T> == 2) {
                // The compiler is not told that the weights are the same, so that it loads them
                // anew: kept from the first part they would displace sums from the registers.
                int64_t same_step = step;
                asm("" : "+r"(same_step));
                add_part.template operator()<1>(same_step);
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
                store(tile + row * kTileColumns + first + v * Vec::kSize, sums[row][v]);
            }
        }
    }
}

#if defined(__AVX512BF16__)
// The same with dot products of bfloat16 pairs: one instruction for two k of 16 columns. (It treats
// numbers below 2^-126 as zero.)
template <int kRows, int kPanels>
static void multiply_pairs(const uint32_t* x, const uint32_t* panel, int64_t panel_words,
                           int64_t steps, float* tile, bool resume, Prefetch prefetch) {
    constexpr int kTileColumns = kPanels * kPanelColumns;
    constexpr int kVectors = kTileColumns / 16;
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            sums[row][v] =
                resume ? _mm512_loadu_ps(tile + row * kTileColumns + v * 16) : _mm512_setzero_ps();
        }
    }
    for (int64_t step = 0; step < steps; ++step, x += kRows, panel += kPanelColumns) {
        __m512bh weights[kVectors];
        prefetch.step<kPanels>(panel_words);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            weights[v] = (__m512bh)_mm512_loadu_si512(panel + v / 2 * panel_words + v % 2 * 16);
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            int pair;
            std::memcpy(&pair, x + row, sizeof pair);  // x may be rows of 2-byte alignment
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[row][v] = _mm512_dpbf16_ps(sums[row][v], value, weights[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            _mm512_storeu_ps(tile + row * kTileColumns + v * 16, sums[row][v]);
        }
    }
}
#endif

template <typename T>
using Multiply = void(const RowElement<T>* x, const uint32_t* panel, int64_t panel_words,
                      int64_t steps, float* tile, bool resume, Prefetch prefetch);

// The inner loop for a number of rows known only at run time.
template <typename T, int kPanels, int kRows>
static Multiply<T>* multiply_for(int64_t rows) {
    if constexpr (kRows == 0) {
        return nullptr;
    } else {
        if (rows != kRows) return multiply_for<T, kPanels, kRows - 1>(rows);
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, BFloat16>) {
            return multiply_pairs<kRows, kPanels>;
        } else {
            return multiply<T, kRows, kPanels>;
        }
#else
        return multiply<T, kRows, kPanels>;
#endif
    }
}

// The elements of RowLayout that a vector of a row makes, from p on.
template <typename T>
static inline Vec load_elements(const T* p) {
    if constexpr (std::is_same_v<RowElement<T>, float>) {
        return load(p);
    } else {
        return load_words(p);
    }
}

// One element, at a place that a vector would reach beyond; 0 from k on.
template <typename T>
static inline RowElement<T> element_at(const T* row, int64_t index, int64_t k) {
    if constexpr (std::is_same_v<RowElement<T>, float>) {
        return index < k ? to_float(row[index]) : 0.0f;
    } else {
        return word_at(row, index, k);
    }
}

// Lays `rows` rows of x, at most kMaxRows, out as one block of RowLayout.
template <typename T>
static void lay_out_rows(RowElement<T>* block, const T* x, int64_t stride, int64_t rows,
                         int64_t k) {
    static_assert(kMaxRows <= kSquare);
    // Values of k in an element, elements of a row, and those of them that vectors reach. A vector
    // is stored whole and the next one over what it has too much: within the block, therefore.
    constexpr int64_t kDepth = kStepDepth<T> / RowLayout<T>::kPerStep;
    const int64_t count = steps_of<T>(k) * RowLayout<T>::kPerStep;
    const int64_t reached = k / kDepth;
    int64_t begin = 0;
    for (; begin + kSquare <= reached; begin += kSquare) {
        if (rows == 1) {
            store_words(block + begin, load_elements(x + begin * kDepth));
            continue;
        }
        if ((begin + kSquare - 1) * rows + kSquare > count * rows) break;
        Vec elements[kSquare];
#pragma GCC unroll 16
        for (int row = 0; row < kSquare; ++row) {
            elements[row] =
                row < rows ? load_elements(x + row * stride + begin * kDepth) : splat(0.0f);
        }
        transpose(elements);
#pragma GCC unroll 16
        for (int i = 0; i < kSquare; ++i) store_words(block + (begin + i) * rows, elements[i]);
    }
    for (int64_t index = begin; index < count; ++index) {
        for (int64_t row = 0; row < rows; ++row) {
            block[index * rows + row] = element_at(x + row * stride, index, k);
        }
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
