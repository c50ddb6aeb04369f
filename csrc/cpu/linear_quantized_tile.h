// The inner loops of the quantised linear layer: a few rows of x times one or two panels of codes.
//
// out[i][j] = sum over groups g of scale[g][j] * (sum over k in g of x[i][k] * code[k][j]
//                                                 - zero[g][j] * sum over k in g of x[i][k]).
// The inner sum is one chain of additions over ascending k and the outer one over ascending g,
// whatever the number of rows or panels and whether codes were written out as a piece before:
// converting a code is exact, so that a row's bits do not depend on its batch.
#pragma once

#include <utility>

#include "cpu/quantized_panels.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Vectors that the registers hold, rows of x that are multiplied at once, and rows up to which two
// panels are taken at once (a chain of additions is slow alone).
#if defined(__AVX512F__)
constexpr int kCodeRegisters = 32, kMaxCodeRows = 12, kMaxTwoPanelRows = 6;
#elif defined(__AVX2__)
constexpr int kCodeRegisters = 16, kMaxCodeRows = 6, kMaxTwoPanelRows = 1;
#else
constexpr int kCodeRegisters = 8, kMaxCodeRows = 4, kMaxTwoPanelRows = 0;
#endif

// The most vectors of columns, a power of two, whose sums fit the registers. A single row needs no
// place for weights, which are used once.
constexpr int code_vectors_at_once(int rows, int panels) {
    int vectors = panels * kPanelColumns / Vec::kSize;
    while (vectors > 1 && (rows + (rows > 1)) * vectors + 2 > kCodeRegisters) vectors /= 2;
    return vectors;
}

// Scales and zero points from the first group of a panel on. Their next panel is `panel_stride`
// elements further. Null scales: sums stay as they are (and `resume` goes on with them).
struct GroupScales {
    const void* scales;
    const int8_t* zeros;  // or null
    DType dtype;          // of scales
    float offset;         // kOffset of the codes
    int64_t panel_stride;

    Vec scale(int64_t index) const {
        switch (dtype) {
            case DType::kBFloat16:
                return load(static_cast<const BFloat16*>(scales) + index);
            case DType::kFloat16:
                return load(static_cast<const Float16*>(scales) + index);
            default:
                return load(static_cast<const float*>(scales) + index);
        }
    }
    bool shifted() const { return zeros || offset != 0.0f; }
    // What the sum of x is multiplied by.
    Vec shift(int64_t index) const {
        const Vec constant = splat(-offset);
        return zeros ? constant - load_bytes(zeros + index) : constant;
    }
};

// tile[r][c] of kPanels panels, [kRows][32 * kPanels]: see above. x: a block as lay_out_block
// leaves it, its sums for each group [groups][kRows]. codes: steps of the first panel; the next one
// is `panel_bytes` further. `resume` adds to what the tile holds.
struct CodeArgs {
    const void* x;
    const float* x_sums;
    const uint8_t* codes;
    int64_t panel_bytes, steps, group_steps;
    GroupScales scales;
    float* tile;
    bool resume;
};

template <int kCount, typename Body>
static inline __attribute__((always_inline)) void unrolled(Body&& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        (body.template operator()<kIndex>(), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Adds sums of one group, [kRows][kVectors] from column `first` on, to the tile.
template <int kRows, int kVectors, int kTileColumns>
static inline __attribute__((always_inline)) void finish_group(const CodeArgs& args,
                                                               const Vec (&sums)[kRows][kVectors],
                                                               int first, int64_t group) {
    const GroupScales& scales = args.scales;
    const float* x_sums = args.x_sums + group * kRows;
    const bool onto = group > 0 || args.resume, shifted = scales.shifted();
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
        const int column = first + v * Vec::kSize;
        const int64_t index = column / kPanelColumns * scales.panel_stride + group * kPanelColumns +
                              column % kPanelColumns;
        const Vec scale = scales.scale(index);
        const Vec shift = shifted ? scales.shift(index) : splat(0.0f);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            float* total = args.tile + row * kTileColumns + column;
            Vec sum = sums[row][v];
            if (shifted) sum = fma(shift, splat(x_sums[row]), sum);
            store(total, fma(sum, scale, onto ? load(total) : splat(0.0f)));
        }
    }
}

// Sums over k in float32. Source: see quantized_panels.h. x: [k][kRows] float32.
template <typename Source, int kRows, int kPanels>
struct FloatSums {
    using Element = float;
    static constexpr int kVectors = code_vectors_at_once(kRows, kPanels);

    static inline __attribute__((always_inline)) void add_step(
        Vec (&sums)[kRows][kVectors], const float* x, const uint8_t* const (&step)[kPanels],
        int first) {
        unrolled<kQuantizedDepth>([&]<int kPart>() {
            const float* values = x + kPart * kRows;
            const auto weights = [&](int v) __attribute__((always_inline)) {
                const int column = first + v * Vec::kSize;
                return Source::template value<kPart>(step[column / kPanelColumns],
                                                     column % kPanelColumns);
            };
            if constexpr (kRows == 1) {
                const Vec value = splat(values[0]);
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) sums[0][v] = fma(value, weights(v), sums[0][v]);
            } else {
                Vec loaded[kVectors];
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) loaded[v] = weights(v);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    const Vec value = splat(values[row]);
#pragma GCC unroll 16
                    for (int v = 0; v < kVectors; ++v) {
                        sums[row][v] = fma(value, loaded[v], sums[row][v]);
                    }
                }
            }
        });
    }
    static constexpr int64_t kStepElements = kQuantizedDepth * kRows;
};

#if defined(__AVX512BF16__)
// The same with dot products of bfloat16 pairs. x: [k/2][kRows] words of two neighbouring k.
template <typename Source, int kRows, int kPanels>
struct PairSums {
    using Element = uint32_t;
    static constexpr int kVectors = code_vectors_at_once(kRows, kPanels);

    static inline __attribute__((always_inline)) void add_step(
        Vec (&sums)[kRows][kVectors], const uint32_t* x, const uint8_t* const (&step)[kPanels],
        int first) {
        unrolled<kQuantizedDepth / 2>([&]<int kPart>() {
            const uint32_t* values = x + kPart * kRows;
            __m512bh loaded[kVectors];
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) {
                const int column = first + v * Vec::kSize;
                loaded[v] = (__m512bh)Source::template pair<kPart>(step[column / kPanelColumns],
                                                                   column % kPanelColumns);
            }
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(values[row]));
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) {
                    sums[row][v].v = _mm512_dpbf16_ps(sums[row][v].v, value, loaded[v]);
                }
            }
        });
    }
    static constexpr int64_t kStepElements = kQuantizedDepth / 2 * kRows;
};
#endif

// Fetches the steps that are kNearDistance ahead of these.
template <typename Source, int kPanels>
static inline __attribute__((always_inline)) void fetch_step(
    const uint8_t* const (&step)[kPanels]) {
    constexpr int64_t kLine = 64;
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < Source::kStepBytes; line += kLine) {
            __builtin_prefetch(step[panel] + kNearDistance + line);
        }
    }
}

template <typename Sums, typename Source, int kRows, int kPanels>
static void multiply_codes(const CodeArgs& args) {
    constexpr int kTileColumns = kPanels * kPanelColumns, kVectors = Sums::kVectors;
    const bool raw = !args.scales.scales;
    for (int first = 0; first < kTileColumns; first += kVectors * Vec::kSize) {
        const auto* x = static_cast<const typename Sums::Element*>(args.x);
        const uint8_t* step[kPanels];
        for (int panel = 0; panel < kPanels; ++panel) {
            step[panel] = args.codes + panel * args.panel_bytes;
        }
        int64_t group = 0;
        for (int64_t begin = 0; begin < args.steps; begin += args.group_steps, ++group) {
            const int64_t rest = args.steps - begin;
            const int64_t count = rest < args.group_steps ? rest : args.group_steps;
            Vec sums[kRows][kVectors];
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) {
                    const float* from = args.tile + row * kTileColumns + first + v * Vec::kSize;
                    sums[row][v] = raw && args.resume ? load(from) : splat(0.0f);
                }
            }
            for (int64_t i = 0; i < count; ++i) {
                if constexpr (kRows == 1 && kNearDistance) fetch_step<Source, kPanels>(step);
                Sums::add_step(sums, x, step, first);
                x += Sums::kStepElements;
#pragma GCC unroll 2
                for (int panel = 0; panel < kPanels; ++panel) step[panel] += Source::kStepBytes;
            }
            if (!raw) {
                finish_group<kRows, kVectors, kTileColumns>(args, sums, first, group);
                continue;
            }
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; ++v) {
                    store(args.tile + row * kTileColumns + first + v * Vec::kSize, sums[row][v]);
                }
            }
        }
    }
}

using MultiplyCodes = void(const CodeArgs&);

// The inner loop for a number of rows known only at run time.
template <template <typename, int, int> typename Sums, typename Source, int kPanels, int kRows>
static MultiplyCodes* multiply_codes_for(int64_t rows) {
    if constexpr (kRows == 0) {
        return nullptr;
    } else {
        if (rows != kRows) return multiply_codes_for<Sums, Source, kPanels, kRows - 1>(rows);
        return multiply_codes<Sums<Source, kRows, kPanels>, Source, kRows, kPanels>;
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
