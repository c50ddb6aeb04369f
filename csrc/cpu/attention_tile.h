// The inner part of attention: a block of keys and values, packed for the vector unit, met by a few
// query rows at a time. Every number of rows does the same arithmetic in the same order for a row.
#pragma once

#include <algorithm>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Queries and keys meet in words of 32 bits: a float32 channel, or two bfloat16 channels where the
// processor multiplies and adds pairs of them (exact products, float32 sums).
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = std::is_same_v<T, BFloat16>;
static inline Vec dot_pairs(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
template <typename T>
constexpr bool kPairs = false;
#endif

template <typename T>
static inline Vec multiply_add_words(Vec a, Vec b, Vec sum) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<T>) return dot_pairs(a, b, sum);
#endif
    return fma(a, b, sum);
}

template <typename T>
static constexpr int64_t words_of(int64_t head_dim) {
    return kPairs<T> ? (head_dim + 1) / 2 : head_dim;
}

// A vector of words from `channels` channels; past them zeros.
template <typename T>
static inline Vec load_words(const T* from, int64_t channels) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<T>) {
        if (channels >= 32) return {_mm512_castsi512_ps(_mm512_loadu_si512(from))};
        const __mmask32 mask = (__mmask32{1} << channels) - 1;
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from))};
    }
#endif
    return channels >= Vec::kSize ? load(from) : load_partial(from, static_cast<int>(channels));
}

// The query's words side by side, padded with zeros to whole vectors.
template <typename T>
static inline void pack_query(float* words, const T* query, int64_t head_dim) {
    constexpr int64_t kChannels = Vec::kSize * (kPairs<T> ? 2 : 1);
    for (int64_t channel = 0; channel < head_dim; channel += kChannels, words += Vec::kSize)
        store(words, load_words(query + channel, head_dim - channel));
}

// What will be read after the present block, brought nearer bit by bit while that is worked on, in
// the order of memory: the processor does not foresee rows that are spread over pages.
class Prefetch {
  public:
    static constexpr int kLine = 64;

    // `rows` rows of `row_bytes`, row i at base + offsets[i].
    void start(const char* base, const int64_t* offsets, int64_t rows, int64_t row_bytes) {
        base_ = base;
        offsets_ = offsets;
        rows_ = rows;
        row_lines_ = (row_bytes + kLine - 1) / kLine;
        lines_ = 0;
    }
    void advance(int64_t lines) {
        while (lines > 0) {
            if (lines_ == 0) {
                if (rows_ == 0) return;
                --rows_;
                at_ = base_ + *offsets_++;
                lines_ = row_lines_;
            }
            const int64_t count = lines < lines_ ? lines : lines_;
            for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at_ + i * kLine);
            at_ += count * kLine;
            lines_ -= count;
            lines -= count;
        }
    }
    void finish() { advance(lines_ + rows_ * row_lines_); }

  private:
    const char *base_ = nullptr, *at_ = nullptr;
    const int64_t* offsets_ = nullptr;
    int64_t rows_ = 0, row_lines_ = 0, lines_ = 0;
};

// One block of keys and values of one KV head.
struct Block {
    const char* key_rows;    // in the cache, where key i lies at offsets[i]
    const char* value_rows;  // likewise
    const int64_t* offsets;  // in bytes; beyond the keys in use, those of a key in use
    float* keys;             // packed: [words, kAttentionBlock]
    float* values;           // in float32: [kAttentionBlock, channels]
    uint32_t* value_pairs;   // of two keys each: [kAttentionBlock / 2, channels]
    int64_t head_dim, words, channels;
    // Scores become exponents of 2: dot * scale, or with a cap cap * tanh(dot * scale).
    float scale, cap;
    Prefetch next_keys, next_values;
};

template <typename T>
static inline const T* key_row(const Block& block, int key) {
    return reinterpret_cast<const T*>(block.key_rows + block.offsets[key]);
}

// Keys [begin, end), in whole vectors, so that lanes are keys.
template <typename T>
static void pack_keys(Block& block, int begin, int end) {
    constexpr int kLanes = Vec::kSize, kPerWord = kPairs<T> ? 2 : 1, kChannels = kLanes * kPerWord;
    // As many lines are fetched ahead as are read, a few at a time.
    constexpr int kLines = kLanes * kChannels * static_cast<int>(sizeof(T)) / Prefetch::kLine;
    constexpr int kSteps = kLines < 8 ? kLines : 8;
    int64_t channel = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        for (; channel + 16 <= block.head_dim; channel += 16) {
            for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
                const T* rows[kLanes];
                for (int lane = 0; lane < kLanes; ++lane)
                    rows[lane] = key_row<T>(block, first + lane) + channel;
                Vec columns[16];
                transpose(rows, columns);
                block.next_keys.advance(4);
                float* to = block.keys + channel * kAttentionBlock + first;
                for (int i = 0; i < 16; ++i) store(to + i * kAttentionBlock, columns[i]);
            }
        }
    }
#endif
    for (; channel < block.head_dim; channel += kChannels) {
        const int64_t rest = block.head_dim - channel;
        for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
            Vec square[kLanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) {
                square[lane] = load_words(key_row<T>(block, first + lane) + channel, rest);
                if (lane % (kLanes / kSteps) == 0) block.next_keys.advance(kLines / kSteps);
            }
            transpose(square);
            float* to = block.keys + channel / kPerWord * kAttentionBlock + first;
#pragma GCC unroll 16
            for (int word = 0; word < kLanes; ++word)
                store(to + word * kAttentionBlock, square[word]);
        }
    }
}

// Where the weighted sum reads values: straight from the cache when there are few rows, and no
// partial vectors; otherwise from a float32 copy.
template <typename T>
struct CachedValues {
    static const T* row(const Block& block, int key) {
        return reinterpret_cast<const T*>(block.value_rows + block.offsets[key]);
    }
    static constexpr int kBytes = sizeof(T);  // read from memory for a channel
};
struct CopiedValues {
    static const float* row(const Block& block, int key) {
        return block.values + key * block.channels;
    }
    static constexpr int kBytes = 0;
};

// Makes the copy of values [begin, end).
template <typename T>
static void copy_values(Block& block, int begin, int end) {
    const int64_t row_lines = block.head_dim * sizeof(T) / Prefetch::kLine + 1;
    for (int key = begin; key < end; ++key) {
        const T* from = CachedValues<T>::row(block, key);
        float* to = block.values + key * block.channels;
        block.next_values.advance(row_lines);
        int64_t i = 0;
        for (; i + Vec::kSize <= block.head_dim; i += Vec::kSize) store(to + i, load(from + i));
        if (i < block.head_dim)
            store(to + i, load_partial(from + i, static_cast<int>(block.head_dim - i)));
    }
}

// The state of consecutive rows during a split.
struct Rows {
    const float* queries;  // [rows, words padded]
    float* records;        // [rows, record]: weighted sum, largest score
    float* weight_sums;    // [rows, 16]: sums of weights by lane
    int64_t query_stride, record_stride;
};

// Query times key for keys [from, to), kColumns vectors at a time.
template <typename T, int kRows, int kColumns>
static inline void score(const Block& block, const Rows& rows, int from, int to, float* scores) {
    for (int key = from; key < to; key += kColumns * Vec::kSize) {
        Vec sums[kRows][kColumns];
        for (auto& row : sums)
            for (Vec& sum : row) sum = splat(0.0f);
        const float* keys = block.keys + key;
        for (int64_t word = 0; word < block.words; ++word, keys += kAttentionBlock) {
            if constexpr (kRows < kColumns) {
                Vec query[kRows];
                for (int r = 0; r < kRows; ++r)
                    query[r] = splat(rows.queries[r * rows.query_stride + word]);
#pragma GCC unroll 8
                for (int c = 0; c < kColumns; ++c) {
                    const Vec column = load(keys + c * Vec::kSize);
                    for (int r = 0; r < kRows; ++r)
                        sums[r][c] = multiply_add_words<T>(query[r], column, sums[r][c]);
                }
            } else {
                Vec columns[kColumns];
                for (int c = 0; c < kColumns; ++c) columns[c] = load(keys + c * Vec::kSize);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Vec query = splat(rows.queries[r * rows.query_stride + word]);
                    for (int c = 0; c < kColumns; ++c)
                        sums[r][c] = multiply_add_words<T>(query, columns[c], sums[r][c]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int c = 0; c < kColumns; ++c)
                store(scores + r * kAttentionBlock + key + c * Vec::kSize, sums[r][c]);
    }
}

// Turns the scores of keys [begin, end) into weights relative to the row's largest score so far,
// adds them up, and leaves in `corrections` what the row's earlier sums must be multiplied by; for
// the first `count` of kRows rows.
template <int kRows, bool kWhole>
static inline void weigh(const Block& block, const Rows& rows, int begin, int end, float* scores,
                         float* corrections, int count = kRows) {
    static_assert(kRows <= Vec::kSize);
    if (kWhole) begin = 0, end = kAttentionBlock;
    const int from = begin / Vec::kSize * Vec::kSize;
    float before[Vec::kSize] = {}, after[Vec::kSize] = {};
    float* maxima = rows.records + block.channels;
    for (int r = 0; r < count; ++r) {
        float* row = scores + r * kAttentionBlock;
        Vec largest = splat(-INFINITY);
        for (int key = from; key < end; key += Vec::kSize) {
            Vec exponent = load(row + key) * splat(block.scale);
            if (block.cap != 0.0f) exponent = splat(block.cap) * tanh(exponent);
            if (!kWhole) {  // keys outside weigh nothing
                const Vec index = lane_numbers() + splat(static_cast<float>(key));
                const Vec never = splat(-INFINITY);
                exponent = select_less(index, splat(static_cast<float>(begin)), never, exponent);
                exponent = select_less(index, splat(static_cast<float>(end)), exponent, never);
            }
            store(row + key, exponent);
            largest = max(largest, exponent);
        }
        const float block_max = reduce_max(largest);
        before[r] = maxima[r * rows.record_stride];
        after[r] = block_max > before[r] ? block_max : before[r];
        maxima[r * rows.record_stride] = after[r];
    }
    store(corrections, exp2_nonpositive(load(before) - load(after)));
    for (int r = 0; r < count; ++r) {
        float* row = scores + r * kAttentionBlock;
        Vec sums = load(rows.weight_sums + r * 16) * splat(corrections[r]);
        for (int key = from; key < end; key += Vec::kSize) {
            const Vec weight = exp2_nonpositive(load(row + key) - splat(after[r]));
            store(row + key, weight);
            sums = sums + weight;
        }
        store(rows.weight_sums + r * 16, sums);
    }
}

// sum = sum * correction + weights [begin, end) times values, for kColumns vectors of channels.
template <int kRows, int kColumns, typename Values>
static inline void add_values(Block& block, const Rows& rows, int64_t channel, int begin, int end,
                              const float* weights, const float* corrections) {
    constexpr int kLines = 4 * kColumns * Vec::kSize * Values::kBytes / Prefetch::kLine;
    float* records = rows.records + channel;
    Vec sums[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c)
            sums[r][c] =
                load(records + r * rows.record_stride + c * Vec::kSize) * splat(corrections[r]);
    for (int key = begin; key < end; ++key) {
        const auto* row = Values::row(block, key) + channel;
        if (kLines && key % 4 == 0) block.next_values.advance(kLines);
        // What there is less of stays in registers.
        if constexpr (kRows < kColumns) {
            Vec weight[kRows];
            for (int r = 0; r < kRows; ++r) weight[r] = splat(weights[r * kAttentionBlock + key]);
#pragma GCC unroll 8
            for (int c = 0; c < kColumns; ++c) {
                const Vec column = load(row + c * Vec::kSize);
                for (int r = 0; r < kRows; ++r) sums[r][c] = fma(weight[r], column, sums[r][c]);
            }
        } else {
            Vec columns[kColumns];
            for (int c = 0; c < kColumns; ++c) columns[c] = load(row + c * Vec::kSize);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec weight = splat(weights[r * kAttentionBlock + key]);
                for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(weight, columns[c], sums[r][c]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c)
            store(records + r * rows.record_stride + c * Vec::kSize, sums[r][c]);
}

// Vectors that a tile of rows takes at once: as many sums as hide an addition's latency, and fit
// the registers. Each sum is a chain of its own, so their number changes no result.
template <int kRows>
constexpr int kTileColumns = Vec::kSize == 16 ? 4
                             : kRows == 1     ? 8
                             : kRows <= 3     ? 4
                                              : 2;

// A few rows that all see keys [begin, end) of the block.
template <typename T, typename Values, int kRows>
static void attend_tile(Block& block, const Rows& rows, int begin, int end) {
    constexpr int kColumns = kTileColumns<kRows>, kHalf = kAttentionBlock / 2;
    constexpr int kHalfColumns = std::min<int>(kColumns, kHalf / Vec::kSize);
    alignas(64) float weights[kRows * kAttentionBlock];
    alignas(64) float corrections[Vec::kSize];
    if (begin < kHalf && end > kHalf) {
        score<T, kRows, kColumns>(block, rows, 0, kAttentionBlock, weights);
    } else {
        const int half = begin < kHalf ? 0 : kHalf;
        score<T, kRows, kHalfColumns>(block, rows, half, half + kHalf, weights);
    }
    if (begin == 0 && end == kAttentionBlock) {
        weigh<kRows, true>(block, rows, begin, end, weights, corrections);
    } else {
        weigh<kRows, false>(block, rows, begin, end, weights, corrections);
    }
    int64_t channel = 0;
    for (; channel + kColumns * Vec::kSize <= block.head_dim; channel += kColumns * Vec::kSize)
        add_values<kRows, kColumns, Values>(block, rows, channel, begin, end, weights, corrections);
    for (; channel < block.head_dim; channel += Vec::kSize)
        add_values<kRows, 1, Values>(block, rows, channel, begin, end, weights, corrections);
}

// The most rows of a tile: their sums and a few keys or values fill the registers.
constexpr int kTileRows = 6;

// `count` rows that all see keys [begin, end) of the block, in tiles of about equal size.
template <typename T, typename Values>
static void attend_rows(Block& block, Rows rows, int64_t count, int begin, int end) {
    for (int64_t tiles = (count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t taken = (count + tiles - 1) / tiles;
        switch (taken) {
            case 1:
                attend_tile<T, Values, 1>(block, rows, begin, end);
                break;
            case 2:
                attend_tile<T, Values, 2>(block, rows, begin, end);
                break;
            case 3:
                attend_tile<T, Values, 3>(block, rows, begin, end);
                break;
            case 4:
                attend_tile<T, Values, 4>(block, rows, begin, end);
                break;
            case 5:
                attend_tile<T, Values, 5>(block, rows, begin, end);
                break;
            case 6:
                attend_tile<T, Values, 6>(block, rows, begin, end);
                break;
        }
        rows.queries += taken * rows.query_stride;
        rows.records += taken * rows.record_stride;
        rows.weight_sums += taken * 16;
        count -= taken;
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
