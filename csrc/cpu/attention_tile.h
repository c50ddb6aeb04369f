// The inner part of attention: a block of keys and values met by a few query rows at a time. Every
// number of rows does the same arithmetic in the same order for a row.
#pragma once

#include <algorithm>

#include "cpu/attention_block.h"
#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/partial.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// The state of consecutive rows during a split.
struct Rows {
    const float* queries;  // [rows, words padded]
    float* records;        // [rows, record]: weighted sum
    float* weight_sums;    // [rows, 16]: sums of weights by lane
    float* maxima;         // [rows]: largest score so far; a vector may be read from any
    int64_t query_stride, record_stride;

    void skip(int64_t count) {
        queries += count * query_stride;
        records += count * record_stride;
        weight_sums += count * 16;
        maxima += count;
    }
};

// Vectors that a tile of rows takes at once: as many sums as hide an addition's latency, and fit
// the registers. Each sum is a chain of its own, so their number changes no result.
template <int kRows>
constexpr int kTileColumns = Vec::kSize == 16 ? 4
                             : kRows == 1     ? 8
                             : kRows <= 3     ? 4
                                              : 2;
// Of keys; the queries' parts take registers too.
template <typename Reading, int kRows>
constexpr int kScoreColumns = Reading::kParts == 2 && kRows == 3 ? 3 : kTileColumns<kRows>;

// sums += a word of the queries, or its parts, times one of kColumns vectors of keys.
template <typename T, typename Reading, int kRows, int kColumns>
static inline void add_products(Vec (&sums)[kRows][kColumns], const Rows& rows, int64_t word,
                                const float* keys) {
    constexpr int kParts = Reading::kParts;
    const float* queries = rows.queries + word;
    // What there is less of stays in registers.
    if constexpr (kRows <= kColumns) {
        Vec query[kParts][kRows], column;
        for (int part = 0; part < kParts; ++part)
            for (int r = 0; r < kRows; ++r)
                query[part][r] = splat(queries[r * rows.query_stride + part]);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
            for (int part = 0; part < kParts; ++part) {
                Reading::take(keys + c * Vec::kSize, part, column);
                for (int r = 0; r < kRows; ++r)
                    sums[r][c] = multiply_add_words<T>(query[part][r], column, sums[r][c]);
            }
        }
    } else {
        Vec columns[kColumns];
        for (int part = 0; part < kParts; ++part) {
            for (int c = 0; c < kColumns; ++c)
                Reading::take(keys + c * Vec::kSize, part, columns[c]);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec query = splat(queries[r * rows.query_stride + part]);
                for (int c = 0; c < kColumns; ++c)
                    sums[r][c] = multiply_add_words<T>(query, columns[c], sums[r][c]);
            }
        }
    }
}

// Query times key for kColumns vectors of keys.
template <typename T, typename Reading, int kRows, int kColumns>
static inline void score(Block& block, const Rows& rows, int key, float* scores) {
    Vec sums[kRows][kColumns];
    for (auto& row : sums)
        for (Vec& sum : row) sum = splat(0.0f);
    if constexpr (Reading::kParts == 1) {
        const float* keys = block.keys + key;
        // Few rows: half as many lines are fetched ahead as were read to pack these keys. Many: a
        // line for each word, so that the first tiles ask for all, and it comes during the others.
        constexpr bool kFewRows = Reading::kBytes > 0;
        Prefetch next = block.next;
        for (int64_t word = 0; word < block.words; ++word, keys += kAttentionBlock) {
            next.advance<kFewRows>(kFewRows ? kColumns / 2 : 1);
            add_products<T, Reading>(sums, rows, word, keys);
        }
        block.next = next;
    } else {
        // Packing and multiplying keep different parts of the processor busy: a little of each in
        // turns, so that one hides behind the other.
        constexpr int kLanes = kColumns * Vec::kSize;
        alignas(64) float pairs[4 * kLanes];
        const char* base = block.key_rows;
        const int64_t* offsets = block.offsets + key;
        Prefetch next = block.next;
        for (int64_t channel = 0; channel < block.head_dim; channel += 8, base += 16) {
            for (int c = 0; c < kColumns; ++c) {
                next.advance(2);
                Reading::pack(base, offsets + c * Vec::kSize, pairs + c * Vec::kSize, kLanes);
            }
#pragma GCC unroll 4
            for (int word = 0; word < 4; ++word)
                add_products<T, Reading>(sums, rows, channel + 2 * word, pairs + word * kLanes);
        }
        block.next = next;
    }
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c)
            store(scores + r * kAttentionBlock + key + c * Vec::kSize, sums[r][c]);
}

// For keys [from, to), a multiple of two vectors.
template <typename T, typename Reading, int kRows>
static inline void score(Block& block, const Rows& rows, int from, int to, float* scores) {
    constexpr int kColumns = kScoreColumns<Reading, kRows>;
    for (; from + kColumns * Vec::kSize <= to; from += kColumns * Vec::kSize)
        score<T, Reading, kRows, kColumns>(block, rows, from, scores);
    for (; from + 2 * Vec::kSize <= to; from += 2 * Vec::kSize)
        score<T, Reading, kRows, 2>(block, rows, from, scores);
    if constexpr (kColumns % 2) {
        if (from < to) score<T, Reading, kRows, 1>(block, rows, from, scores);
    }
}

// Lane r is the largest lane of vector r.
template <int kRows>
static inline Vec largest_lanes(const Vec (&rows)[kRows]) {
    static_assert(kRows <= Vec::kSize);
#if defined(__AVX512F__)
    // Vectors are halved and joined until each has lanes of all: four times half as many of them.
    __m512 v[16];
    for (int r = 0; r < 16; ++r) v[r] = rows[r < kRows ? r : kRows - 1].v;
    for (int r = 0; r < 16; r += 2) {
        v[r] = _mm512_max_ps(_mm512_shuffle_f32x4(v[r], v[r + 1], 0x44),
                             _mm512_shuffle_f32x4(v[r], v[r + 1], 0xee));
    }
    for (int r = 0; r < 16; r += 4) {
        v[r] = _mm512_max_ps(_mm512_shuffle_f32x4(v[r], v[r + 2], 0x88),
                             _mm512_shuffle_f32x4(v[r], v[r + 2], 0xdd));
    }
    for (int r = 0; r < 16; r += 8) {
        v[r] =
            _mm512_max_ps(_mm512_unpacklo_ps(v[r], v[r + 4]), _mm512_unpackhi_ps(v[r], v[r + 4]));
    }
    const __m512d low = _mm512_castps_pd(v[0]), high = _mm512_castps_pd(v[8]);
    // Quarter q holds rows q, 4 + q, 8 + q, 12 + q.
    const __m512 joined = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_ps(order, joined)};
#else
    float lanes[Vec::kSize] = {};
    for (int r = 0; r < kRows; ++r) lanes[r] = reduce_max(rows[r]);
    return load(lanes);
#endif
}

// Turns the scores of keys [begin, end) into weights relative to the row's largest score so far,
// adds them up, and leaves in `corrections` what the row's earlier sums must be multiplied by; for
// the first `count` of kRows rows.
template <int kRows, bool kWhole>
static inline void weigh(const Block& block, const Rows& rows, int begin, int end, float* scores,
                         float* corrections, int count = kRows) {
    if (kWhole) begin = 0, end = kAttentionBlock;
    const int from = begin / Vec::kSize * Vec::kSize;
    Vec largest[kRows];
    const auto find_exponents = [&](const auto& exponent_of) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            largest[r] = splat(-INFINITY);
            if (r >= count) continue;
            float* row = scores + r * kAttentionBlock;
            for (int key = from; key < end; key += Vec::kSize) {
                Vec exponent = exponent_of(load(row + key) * splat(block.scale));
                if (!kWhole) {  // keys outside weigh nothing
                    const Vec index = lane_numbers() + splat(static_cast<float>(key));
                    const Vec never = splat(-INFINITY);
                    exponent =
                        select_less(index, splat(static_cast<float>(begin)), never, exponent);
                    exponent = select_less(index, splat(static_cast<float>(end)), exponent, never);
                }
                store(row + key, exponent);
                largest[r] = max(exponent, largest[r]);
            }
        }
    };
    if (block.cap != 0.0f) {
        find_exponents([&](Vec score) { return splat(block.cap) * tanh(score); });
    } else {
        find_exponents([](Vec score) { return score; });
    }
    const Vec before = load(rows.maxima), after = max(largest_lanes(largest), before);
    alignas(64) float maxima[Vec::kSize];
    store(maxima, after);
    store_some(rows.maxima, after, count);
    store(corrections, exp2_nonpositive(before - after));
    for (int r = 0; r < count; ++r) {
        float* row = scores + r * kAttentionBlock;
        Vec sums = load(rows.weight_sums + r * 16) * splat(corrections[r]);
        for (int key = from; key < end; key += Vec::kSize) {
            const Vec weight = exp2_nonpositive(load(row + key) - splat(maxima[r]));
            store(row + key, weight);
            sums = sums + weight;
        }
        store(rows.weight_sums + r * 16, sums);
    }
}

// sum = sum * correction + weights [begin, end) times values, for kColumns vectors of channels.
template <typename Reading, int kRows, int kColumns>
static inline void add_values(Block& block, const Rows& rows, int64_t channel, int begin, int end,
                              const float* weights, const float* corrections) {
    constexpr int kParts = Reading::kParts;
    // What is fetched ahead meanwhile.
    constexpr int kBytes = kColumns * Vec::kSize * Reading::kBytes;
    constexpr int kSteps = kBytes && kBytes < Prefetch::kLine ? Prefetch::kLine / kBytes : 1;
    constexpr int kLines = kSteps * kBytes / Prefetch::kLine;
    float* records = rows.records + channel;
    Vec sums[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; c += kParts)
            Reading::load_sums(records + r * rows.record_stride + c * Vec::kSize, sums[r] + c);
        for (Vec& sum : sums[r]) sum = sum * splat(corrections[r]);
    }
    // A copy, since what is in memory is read anew after each part.
    Prefetch next = block.next;
    const auto values = Reading::values(block);
    for (int step = begin / Reading::kKeys; step < end / Reading::kKeys; ++step) {
        const auto row = values(step) + channel / kParts;
        if constexpr (kLines > 0)
            if (step % kSteps == 0) next.advance(kLines);
        if constexpr (kRows <= kColumns) {
            Vec weight[kRows], column;
            for (int r = 0; r < kRows; ++r) weight[r] = splat(weights[r * kAttentionBlock + step]);
#pragma GCC unroll 8
            for (int c = 0; c < kColumns; ++c) {
                Reading::take(row + c / kParts * Vec::kSize, c % kParts, column);
                for (int r = 0; r < kRows; ++r)
                    sums[r][c] = Reading::multiply_add(weight[r], column, sums[r][c]);
            }
        } else {
            Vec columns[kColumns], column;
            for (int c = 0; c < kColumns; ++c) {
                Reading::take(row + c / kParts * Vec::kSize, c % kParts, column);
                columns[c] = column;
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec weight = splat(weights[r * kAttentionBlock + step]);
                for (int c = 0; c < kColumns; ++c)
                    sums[r][c] = Reading::multiply_add(weight, columns[c], sums[r][c]);
            }
        }
    }
    block.next = next;
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; c += kParts)
            Reading::store_sums(records + r * rows.record_stride + c * Vec::kSize, sums[r] + c);
}

// A few rows that all see keys [begin, end) of the block.
template <typename T, typename Reading, int kRows>
static void attend_tile(Block& block, const Rows& rows, int begin, int end) {
    constexpr int kColumns = kTileColumns<kRows>, kHalf = kAttentionBlock / 2;
    alignas(64) float weights[kRows * kAttentionBlock];
    alignas(64) float corrections[Vec::kSize];
    score<T, Reading, kRows>(block, rows, begin < kHalf ? 0 : kHalf,
                             end > kHalf ? kAttentionBlock : kHalf, weights);
    if (begin == 0 && end == kAttentionBlock) {
        weigh<kRows, true>(block, rows, begin, end, weights, corrections);
    } else {
        weigh<kRows, false>(block, rows, begin, end, weights, corrections);
    }
#if defined(__AVX512BF16__)
    if constexpr (Reading::kKeys == 2) {
        for (int r = 0; r < kRows; ++r) {
            float* row = weights + r * kAttentionBlock;
            const Vec first = round_to_pairs(row), second = round_to_pairs(row + 2 * Vec::kSize);
            store(row, first);
            store(row + Vec::kSize, second);
        }
    }
#endif
    int64_t channel = 0;
    for (; channel + kColumns * Vec::kSize <= block.head_dim; channel += kColumns * Vec::kSize)
        add_values<Reading, kRows, kColumns>(block, rows, channel, begin, end, weights,
                                             corrections);
    constexpr int kLeast = Reading::kParts;
    for (; channel < block.head_dim; channel += kLeast * Vec::kSize)
        add_values<Reading, kRows, kLeast>(block, rows, channel, begin, end, weights, corrections);
}

// The most rows of a tile: their sums and a few keys or values fill the registers.
constexpr int kTileRows = 6;

// `count` rows that all see keys [begin, end) of the block, in tiles of about equal size.
template <typename T, typename Reading>
static void attend_rows(Block& block, Rows rows, int64_t count, int begin, int end) {
    for (int64_t tiles = (count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t taken = (count + tiles - 1) / tiles;
        switch (taken) {
            case 1:
                attend_tile<T, Reading, 1>(block, rows, begin, end);
                break;
            case 2:
                attend_tile<T, Reading, 2>(block, rows, begin, end);
                break;
            case 3:
                attend_tile<T, Reading, 3>(block, rows, begin, end);
                break;
            case 4:
                attend_tile<T, Reading, 4>(block, rows, begin, end);
                break;
            case 5:
                attend_tile<T, Reading, 5>(block, rows, begin, end);
                break;
            case 6:
                attend_tile<T, Reading, 6>(block, rows, begin, end);
                break;
        }
        rows.skip(taken);
        count -= taken;
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
