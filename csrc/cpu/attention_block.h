// A block of keys and values of one KV head, and how query rows read it.
#pragma once

#include <atomic>

#include "cpu/attention.h"
#include "cpu/bfloat16_pairs.h"
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
// 32 numbers rounded to bfloat16, side by side.
static inline Vec round_to_pairs(const float* from) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(from + Vec::kSize).v, load(from).v);
    Vec words;
    std::memcpy(&words.v, &pairs, sizeof pairs);
    return words;
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
// the order of memory: the processor does not foresee rows that are spread over pages. A line of
// keys and the same line of values take turns, since two streams come faster than one.
class Prefetch {
  public:
    static constexpr int kLine = 64;

    // `rows` rows of `row_bytes`, row i of the keys at keys + offsets[i], of the values likewise.
    void start(const char* keys, const char* values, const int64_t* offsets, int64_t rows,
               int64_t row_bytes) {
        base_ = keys;
        step_ = values - keys;
        offsets_ = offsets;
        rows_ = rows;
        row_bytes_ = (row_bytes + kLine - 1) / kLine * kLine;
        at_ = end_ = nullptr;
    }
    // Inlined where registers are few: a call would have them all stored. kSpread: lines are asked
    // for some cycles apart.
    template <bool kSpread = true>
    [[gnu::always_inline]] void advance(int lines) {
        for (int i = 0; i < lines; ++i) {
            if (at_ == end_) [[unlikely]] {
                if (rows_ == 0) return;
                --rows_;
                at_ = base_ + *offsets_++;
                end_ = at_ + row_bytes_;
            }
            __builtin_prefetch(at_);
            at_ += step_;
            if constexpr (kSpread) at_ = delayed(at_);
            step_ = kLine - step_;  // to the values, and back to the keys' next line
        }
    }
    void finish() {
        while (at_ != end_ || rows_ > 0) advance<false>(1);
    }

  private:
    // The same address, some cycles later: as many as few rows take to work on a line that is
    // there. A processor that looks far ahead would otherwise ask for many lines at once, and what
    // the rows at work miss would wait behind them.
    static const char* delayed(const char* address) {
#if defined(__AVX2__)
        asm("imul $1, %0\n\timul $1, %0" : "+r"(address));
#endif
        return address;
    }

    const char *base_ = nullptr, *at_ = nullptr, *end_ = nullptr;
    const int64_t* offsets_ = nullptr;
    int64_t rows_ = 0, row_bytes_ = 0, step_ = 0;
};

// One block of keys and values of one KV head.
struct Block {
    const char* key_rows;    // in the cache, where key i lies at offsets[i]
    const char* value_rows;  // likewise
    const int64_t* offsets;  // in bytes; beyond the keys in use, those of a key in use
    float* keys;             // packed: [words, kAttentionBlock]
    float* values;           // in float32: [kAttentionBlock, channels]
    uint32_t* value_pairs;   // of two keys each: [kAttentionBlock / 2, channels]
    bool has_pairs;          // whether they are those of this block
    int64_t head_dim, words, channels;
    // Scores become exponents of 2: dot * scale, or with a cap cap * tanh(dot * scale).
    float scale, cap;
    Prefetch next;
};

template <typename T>
static inline const T* key_row(const Block& block, int key) {
    return reinterpret_cast<const T*>(block.key_rows + block.offsets[key]);
}
template <typename T>
static inline const T* value_row(const Block& block, int key) {
    return reinterpret_cast<const T*>(block.value_rows + block.offsets[key]);
}

// Gives a key's row of values.
template <typename T>
static inline auto cached_values(const Block& block) {
    return [rows = block.value_rows, offsets = block.offsets](int key) {
        return reinterpret_cast<const T*>(rows + offsets[key]);
    };
}

// Values of one key after the other.
struct SingleKeys {
    static constexpr int kKeys = 1;
    static Vec multiply_add(Vec weight, Vec column, Vec sum) { return fma(weight, column, sum); }
};

// How rows read a block. Many rows: from packed words and a float32 copy of the values.
struct CopiedBlock : SingleKeys {
    // Queries' words that a packed word of a key meets, and vectors of channels that lie together.
    static constexpr int kParts = 1;
    static void take(const float* from, int, Vec& column) { column = load(from); }
    static auto values(const Block& block) {
        return [values = block.values, channels = block.channels](int key) {
            return values + key * channels;
        };
    }
    // Bytes to be fetched ahead for a channel of kKeys keys. 0 for many rows, whose scores leave
    // the time for all of it. For few it is what is read of values, or half of it where keys are
    // packed: packing and scores then fetch half as much again as is read of keys.
    static constexpr int kBytes = 0;
    static void load_sums(const float* from, Vec* sums) { sums[0] = load(from); }
    static void store_sums(float* to, const Vec* sums) { store(to, sums[0]); }
};

// Few rows, and no partial vectors: values straight from the cache.
template <typename T>
struct CachedBlock : CopiedBlock {
    static void take(const float* from, int, Vec& column) { column = load(from); }
    static void take(const T* from, int, Vec& column) { column = load(from); }
    static auto values(const Block& block) { return cached_values<T>(block); }
    static constexpr int kBytes = sizeof(T) / 2;
};
template <>
struct CachedBlock<float> : CopiedBlock {
    static auto values(const Block& block) { return cached_values<float>(block); }
    static constexpr int kBytes = 2;
};

#if defined(__AVX512BF16__)
// Rows that see the whole of a block of bfloat16: weights are rounded to bfloat16, and meet the
// values of two neighbouring keys in one instruction. The sum of the weights is of them unrounded.
// Many rows: from `value_pairs`.
struct CopiedPairs : CopiedBlock {
    static constexpr int kKeys = 2;
    static auto values(const Block& block) {
        return [pairs = block.value_pairs, channels = block.channels](int pair) {
            return reinterpret_cast<const float*>(pairs + pair * channels);
        };
    }
    static Vec multiply_add(Vec weights, Vec column, Vec sum) {
        return dot_pairs(weights, column, sum);
    }
};

// Few rows, and no partial vectors: straight from the cache.
struct CachedPairs : CopiedPairs {
    struct KeyPair {
        const BFloat16 *even, *odd;
        KeyPair operator+(int64_t channels) const { return {even + channels, odd + channels}; }
    };
    using CopiedPairs::take;
    static void take(const KeyPair& from, int, Vec& column) {
        const auto half = [](const BFloat16* values) {
            return _mm512_castsi256_si512(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        };
        column.v = _mm512_castsi512_ps(
            _mm512_permutex2var_epi16(half(from.even), alternating(0), half(from.odd)));
    }
    static auto values(const Block& block) {
        return [value = cached_values<BFloat16>(block)](int pair) {
            return KeyPair{value(2 * pair), value(2 * pair + 1)};
        };
    }
    static constexpr int kBytes = 2;
    // Which elements of two vectors make one whose elements come from both in turns, each from
    // `first` on.
    static __m512i alternating(int first) {
        const __m512i words =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(
            _mm512_add_epi32(words, _mm512_set1_epi32(first)),
            _mm512_slli_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(first + 32)), 16));
    }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Few rows of bfloat16, and no partial vectors of pairs: keys and values are read from the cache as
// pairs of channels. Taking a pair apart where it is used costs less than storing and loading it as
// two words, or than moving halves of a vector to whole lanes.
struct PairedBlock : SingleKeys {
    static constexpr int kParts = 2;
    // 8 channels of 8 keys, as 4 vectors that are `stride` floats apart.
    static void pack(const char* rows, const int64_t* offsets, float* pairs, int64_t stride) {
        transpose_pairs(rows, offsets, pairs, stride);
    }
    // The second part follows the first. What is read twice need not stay in a register.
    static void take(const float* from, int part, Vec& column) {
        if (part == 0) {
            column = first_of_pairs(load(from));
        } else {
            std::atomic_signal_fence(std::memory_order_seq_cst);
            column = second_of_pairs(load(from), column);
        }
    }
    static auto values(const Block& block) { return cached_values<float>(block); }
    static constexpr int kBytes = 2;
    static void load_sums(const float* from, Vec* sums) {
        load_alternating(from, sums[0], sums[1]);
    }
    static void store_sums(float* to, const Vec* sums) { store_alternating(to, sums[0], sums[1]); }
};
#endif

// Keys [begin, end), in whole vectors, so that lanes are keys.
template <typename T, bool kFewRows>
static void pack_keys(Block& block, int begin, int end) {
    constexpr int kLanes = Vec::kSize, kPerWord = kPairs<T> ? 2 : 1, kChannels = kLanes * kPerWord;
    // As many lines are fetched ahead as are read, a few at a time.
    constexpr int kLines = kLanes * kChannels * static_cast<int>(sizeof(T)) / Prefetch::kLine;
    constexpr int kSteps = kLines < 8 ? kLines : 8;
    Prefetch next = block.next;
    for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
        const T* rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rows[lane] = key_row<T>(block, first + lane);
        float* to = block.keys + first;
        int64_t channel = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (std::is_same_v<T, BFloat16>) {
            for (; channel + 8 <= block.head_dim; channel += 8) {
                alignas(32) float pairs[4 * kLanes];
                transpose_pairs(block.key_rows + channel * 2, block.offsets + first, pairs, kLanes);
                if (kFewRows) next.advance(8 * kLanes * sizeof(T) / Prefetch::kLine);
                for (int i = 0; i < 4; ++i, to += 2 * kAttentionBlock) {
                    const Vec pair = load(pairs + i * kLanes), even = first_of_pairs(pair);
                    store(to, even);
                    store(to + kAttentionBlock, second_of_pairs(pair, even));
                }
            }
        }
#endif
        for (; channel < block.head_dim; channel += kChannels) {
            Vec square[kLanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) {
                square[lane] = load_words(rows[lane] + channel, block.head_dim - channel);
                if (kFewRows && lane % (kLanes / kSteps) == 0) next.advance(kLines / kSteps);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int word = 0; word < kLanes; ++word, to += kAttentionBlock)
                store(to, square[word]);
        }
    }
    block.next = next;
}

#if defined(__AVX512BF16__)
// Makes `value_pairs`, once for a block.
static void pack_value_pairs(Block& block) {
    if (block.has_pairs) return;
    block.has_pairs = true;
    const __m512i lower = CachedPairs::alternating(0), upper = CachedPairs::alternating(16);
    uint32_t* to = block.value_pairs;
    for (int key = 0; key < kAttentionBlock; key += 2, to += block.channels) {
        const BFloat16* even = value_row<BFloat16>(block, key);
        const BFloat16* odd = value_row<BFloat16>(block, key + 1);
        for (int64_t channel = 0; channel < block.head_dim; channel += 2 * Vec::kSize) {
            const int64_t rest = block.head_dim - channel;
            const __m512i a = _mm512_castps_si512(load_words(even + channel, rest).v);
            const __m512i b = _mm512_castps_si512(load_words(odd + channel, rest).v);
            _mm512_storeu_si512(to + channel, _mm512_permutex2var_epi16(a, lower, b));
            if (channel + Vec::kSize < block.channels)
                _mm512_storeu_si512(to + channel + Vec::kSize,
                                    _mm512_permutex2var_epi16(a, upper, b));
        }
    }
}
#endif

// Copies values [begin, end).
template <typename T>
static void copy_values(Block& block, int begin, int end) {
    for (int key = begin; key < end; ++key) {
        const T* from = value_row<T>(block, key);
        float* to = block.values + key * block.channels;
        int64_t i = 0;
        for (; i + Vec::kSize <= block.head_dim; i += Vec::kSize) store(to + i, load(from + i));
        if (i < block.head_dim)
            store(to + i, load_partial(from + i, static_cast<int>(block.head_dim - i)));
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
