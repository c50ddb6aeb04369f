// Finding tokens by rank without sorting the vocabulary. Tokens are ordered by logit, the larger
// first, and equal logits by id, the lower first. A set of the first so many is described by a Cut.
// Cuts are found by a histogram of the logits and an exact selection within the one bin that the
// cut falls into; whole blocks of the vocabulary whose largest logit is too small are skipped.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

constexpr int64_t kBlock = kSamplingBlock;
constexpr int kBins = 512;
constexpr float kInfinity = __builtin_inff();

// Keeps tokens with a larger logit, and those with this logit up to this id.
struct Cut {
    float value;
    int64_t id;
};

// A row of logits with what is known about it; the arrays are the thread's workspace.
struct Row {
    const float* values;  // [size]
    int64_t size, blocks;
    uint64_t* keys;     // [size]
    float* candidates;  // [size] and kSamplingPadding, logits
    int32_t* ids;       // [size] and kSamplingPadding, of the candidates
    float* edited;      // [size]
    float* block_max;   // [blocks]
    float* block_sum;   // [blocks]
    float max;
    float inverse_temperature;

    int block_size(int64_t block) const {
        const int64_t left = size - block * kBlock;
        return static_cast<int>(left < kBlock ? left : kBlock);
    }
    // How many tokens of the block have an id up to the cut's.
    int ties(int64_t block, const Cut& cut) const {
        const int64_t ties = cut.id + 1 - block * kBlock, count = block_size(block);
        return static_cast<int>(ties < 0 ? 0 : ties < count ? ties : count);
    }
};

static Row make_row(const float* values, int64_t size, char* workspace) {
    Row row = {};
    row.values = values;
    row.size = size;
    row.blocks = (size + kBlock - 1) / kBlock;
    row.keys = reinterpret_cast<uint64_t*>(workspace);
    row.candidates = reinterpret_cast<float*>(row.keys + size);
    row.ids = reinterpret_cast<int32_t*>(row.candidates + size + kSamplingPadding);
    row.edited = reinterpret_cast<float*>(row.ids + size + kSamplingPadding);
    row.block_max = row.edited + size;
    row.block_sum = row.block_max + row.blocks;
    row.inverse_temperature = 1.0f;
    return row;
}

static bool has_nan(const float* x, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; ++i) found |= x[i] != x[i];
    return found;
}

static float maximum(const float* x, int64_t count) {
    Vec largest = splat(-kInfinity);
    int64_t i = 0;
    for (; i + Vec::kSize <= count; i += Vec::kSize) largest = max(largest, load(x + i));
    if (i < count) {
        largest = max(largest, load_partial(x + i, static_cast<int>(count - i), -kInfinity));
    }
    return reduce_max(largest);
}

static float minimum(const float* x, int64_t count) {
    Vec smallest = splat(kInfinity);
    int64_t i = 0;
    for (; i + Vec::kSize <= count; i += Vec::kSize) smallest = min(smallest, load(x + i));
    if (i < count) {
        smallest = min(smallest, load_partial(x + i, static_cast<int>(count - i), kInfinity));
    }
    return reduce(smallest, [](float a, float b) { return a < b ? a : b; });
}

// Fills block_max and max.
static SampleStatus scan(Row& row) {
    row.max = -kInfinity;
    for (int64_t block = 0; block < row.blocks; ++block) {
        const float* x = row.values + block * kBlock;
        if (has_nan(x, row.block_size(block))) return SampleStatus::kNotANumber;
        row.block_max[block] = maximum(x, row.block_size(block));
        if (row.block_max[block] > row.max) row.max = row.block_max[block];
    }
    return row.max == -kInfinity ? SampleStatus::kNothingLeft : SampleStatus::kSampled;
}

// weights[i] = exp((x[i] - max) / temperature).
static void exponentials(const Row& row, const float* x, int count, float* weights) {
    const Vec top = splat(row.max), scale = splat(row.inverse_temperature);
    int i = 0;
    for (; i + Vec::kSize <= count; i += Vec::kSize) {
        store(weights + i, exp((load(x + i) - top) * scale));
    }
    if (i < count) {
        const Vec rest = load_partial(x + i, count - i, -kInfinity);
        store(weights + i, exp((rest - top) * scale));
    }
}

// By what a set of tokens is measured: how many there are, or the sum of their weights.
enum class Measure { kCount, kWeight };

static void weigh(const Row& row, const float* x, int count, Measure measure, float* weights) {
    if (measure == Measure::kWeight) {
        exponentials(row, x, count, weights);
    } else {
        for (int i = 0; i < count; ++i) weights[i] = 1.0f;
    }
}

// The weights of a block, 0 for the tokens that the cut drops; `weights` has kBlock places.
static int weigh_block(const Row& row, int64_t block, const Cut& cut, float* weights) {
    const int count = row.block_size(block), ties = row.ties(block, cut);
    const float* x = row.values + block * kBlock;
    exponentials(row, x, count, weights);
    for (int i = 0; i < ties; ++i) weights[i] = x[i] >= cut.value ? weights[i] : 0.0f;
    for (int i = ties; i < count; ++i) weights[i] = x[i] > cut.value ? weights[i] : 0.0f;
    return count;
}

// A token's logit and id as one number: of two tokens the one that comes first (larger logit, then
// lower id) has the larger key, and no two keys are equal.
static uint64_t key_of(float value, int64_t id) {
    uint32_t bits;
    value += 0.0f;  // -0 and 0 are the same logit
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

static Cut cut_at(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    Cut cut;
    std::memcpy(&cut.value, &bits, sizeof bits);
    cut.id = 0xffffffffu - static_cast<uint32_t>(key);
    return cut;
}

static double weigh_keys(const Row& row, const uint64_t* keys, int64_t count, Measure measure) {
    if (measure == Measure::kCount) return static_cast<double>(count);
    double total = 0.0;
    float values[kBlock], weights[kBlock];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int size = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
        for (int i = 0; i < size; ++i) values[i] = cut_at(keys[begin + i]).value;
        exponentials(row, values, size, weights);
        for (int i = 0; i < size; ++i) total += weights[i];
    }
    return total;
}

// Quickselect (Hoare, 1961): the key at which, from the largest key down, `amount` is reached; the
// smallest key if it never is. Afterwards this key and all larger ones are the first of `keys`.
static uint64_t select_key(const Row& row, uint64_t* keys, int64_t count, Measure measure,
                           double amount) {
    uint64_t random = 0x9e3779b97f4a7c15u;  // for pivots only: expected linear time on any input
    while (count > 1) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        const int64_t picked = static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(count));
        const uint64_t pivot = keys[picked];
        keys[picked] = keys[count - 1];
        int64_t larger = 0;
        for (int64_t i = 0; i < count - 1; ++i) {
            const uint64_t key = keys[i];
            keys[i] = keys[larger];
            keys[larger] = key;
            larger += key > pivot;
        }
        keys[count - 1] = keys[larger];
        keys[larger] = pivot;
        const double above = weigh_keys(row, keys, larger, measure);
        if (above >= amount) {
            count = larger;
            continue;
        }
        const double reached = above + weigh_keys(row, keys + larger, 1, measure);
        if (reached >= amount || larger == count - 1) return pivot;
        amount -= reached;
        keys += larger + 1;
        count -= larger + 1;
    }
    return keys[0];
}

// The `rank`-th largest of the block maxima. At least `rank` tokens reach it.
static float ranked_block_max(const Row& row, int64_t rank) {
    for (int64_t i = 0; i < row.blocks; ++i) row.keys[i] = key_of(row.block_max[i], i);
    const double amount = static_cast<double>(rank);
    return cut_at(select_key(row, row.keys, row.blocks, Measure::kCount, amount)).value;
}

// Bins of equal width between `top` (bin 0) and lower logits; larger logits never have later bins.
struct Bins {
    float top, scale;

    int operator()(float x) const {
        const float place = (top - x) * scale;
        return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
    }
};

// Fills `candidates` with the logits of at least `lower`, in the order of ids; returns how many
// they are. No branch depends on a single logit.
static int64_t find_candidates(const Row& row, float lower) {
    int64_t found = 0;
    for (int64_t block = 0; block < row.blocks; ++block) {
        if (row.block_max[block] < lower) continue;
        const int64_t begin = block * kBlock, end = begin + row.block_size(block);
#if defined(__AVX512F__)
        const __m512 bound = _mm512_set1_ps(lower);
        const __m512i lanes =
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int64_t id = begin; id < end; id += 16) {
            const __mmask16 inside = end - id < 16 ? (1u << (end - id)) - 1 : 0xffffu;
            const __m512 values = _mm512_maskz_loadu_ps(inside, row.values + id);
            const __mmask16 chosen = _mm512_mask_cmp_ps_mask(inside, values, bound, _CMP_GE_OQ);
            if (!chosen) continue;
            const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(id)), lanes);
            // Compressed in a register: compressing stores are slow on some processors.
            _mm512_storeu_ps(row.candidates + found, _mm512_maskz_compress_ps(chosen, values));
            _mm512_storeu_si512(row.ids + found, _mm512_maskz_compress_epi32(chosen, ids));
            found += __builtin_popcount(chosen);
        }
#else
        for (int64_t id = begin; id < end; ++id) {
            row.candidates[found] = row.values[id];
            row.ids[found] = static_cast<int32_t>(id);
            found += row.values[id] >= lower;
        }
#endif
    }
    return found;
}

// Fills `keys` from the first `count` candidates.
static void make_keys(const Row& row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row.keys[i] = key_of(row.candidates[i], row.ids[i]);
}

// Fills `keys` from those of the first `found` candidates that lie in the bin where, from the
// largest logit down, `amount` is reached. Returns how many they are, 0 if it is never reached, and
// takes what lies above the bin off `amount`.
static int64_t make_keys_of_bin(const Row& row, int64_t found, Measure measure, double& amount) {
    constexpr int kCopies = 4;  // neighbours add to different copies and so need not wait
    double sums[kBins][kCopies] = {};
    float weights[kBlock];
    int bins[kBlock];
    const Bins bin_of = {row.max, kBins / (row.max - minimum(row.candidates, found))};
    for (int64_t begin = 0; begin < found; begin += kBlock) {
        const float* x = row.candidates + begin;
        const int count = static_cast<int>(found - begin < kBlock ? found - begin : kBlock);
        weigh(row, x, count, measure, weights);
        for (int i = 0; i < count; ++i) bins[i] = bin_of(x[i]);
        for (int i = 0; i < count; ++i) sums[bins[i]][i % kCopies] += weights[i];
    }
    int bin = 0;
    for (; bin < kBins; ++bin) {
        const double* copies = sums[bin];
        const double sum = (copies[0] + copies[1]) + (copies[2] + copies[3]);
        if (sum >= amount) break;
        amount -= sum;
    }
    int64_t kept = 0;
    for (int64_t begin = 0; begin < found && bin < kBins; begin += kBlock) {
        const float* x = row.candidates + begin;
        const int count = static_cast<int>(found - begin < kBlock ? found - begin : kBlock);
        for (int i = 0; i < count; ++i) bins[i] = bin_of(x[i]);
        for (int i = 0; i < count; ++i) {
            if (bins[i] == bin) row.keys[kept++] = key_of(x[i], row.ids[begin + i]);
        }
    }
    return kept;
}

// The narrowest cut that keeps `amount` of what `cut` keeps. `lower` is a logit that surely has
// `amount` at and above it, or the smallest logit of interest; what lies below is not looked at.
static Cut narrow(const Row& row, const Cut& cut, Measure measure, double amount, float lower) {
    constexpr int64_t kFew = 1024;
    int64_t found = find_candidates(row, lower > cut.value ? lower : cut.value);
    if (found <= kFew) {
        make_keys(row, found);
    } else {
        found = make_keys_of_bin(row, found, measure, amount);
    }
    if (found == 0) return cut;
    const Cut narrowed = cut_at(select_key(row, row.keys, found, measure, amount));
    // The candidates may hold tokens with the cut's own logit that it drops. They come last, so
    // that only rounding can reach them.
    return narrowed.value == cut.value && narrowed.id > cut.id ? cut : narrowed;
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
