// Choosing the next token of each row of logits, and log-probabilities. A row is the work of one
// thread from beginning to end, in an order that depends on the row alone.
#include "cpu/kernels.h"

#include <cfloat>

#include "cpu/parallel.h"
#include "cpu/selection.h"
#include "cpu/simd.h"
#include "philox.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// e^x is 0 below this in exp() of simd.h.
constexpr float kSmallestExponent = -87.3f;
// By so much an exponent is lowered for a bound that the rounding of weights must not break.
constexpr double kMargin = 1e-3;

// The first token with the largest logit.
static SampleStatus argmax(const float* x, int64_t size, int64_t& token) {
    constexpr int64_t kChunk = 2048;
    float top = -kInfinity;
    int64_t chunk = 0;
    for (int64_t begin = 0; begin < size; begin += kChunk) {
        const int64_t count = size - begin < kChunk ? size - begin : kChunk;
        if (has_nan(x + begin, count)) return SampleStatus::kNotANumber;
        const float largest = maximum(x + begin, count);
        if (largest > top) {
            top = largest;
            chunk = begin;
        }
    }
    if (top == -kInfinity) return SampleStatus::kNothingLeft;
    token = chunk;
    while (x[token] != top) ++token;
    return SampleStatus::kSampled;
}

static float sum(const float* x, int count) {
    Vec total = splat(0.0f);
    int i = 0;
    for (; i + Vec::kSize <= count; i += Vec::kSize) total = total + load(x + i);
    if (i < count) total = total + load_partial(x + i, count - i);
    return reduce_sum(total);
}

// Weights of at least `min_weight` that the cut keeps, summed for each block and in all.
static double sum_blocks(const Row& row, const Cut& cut, float min_weight) {
    double total = 0.0;
    float weights[kBlock];
    for (int64_t block = 0; block < row.blocks; ++block) {
        row.block_sum[block] = 0.0f;
        if (row.block_max[block] < cut.value) continue;
        const int count = weigh_block(row, block, cut, weights);
        for (int i = 0; i < count; ++i) weights[i] = weights[i] >= min_weight ? weights[i] : 0.0f;
        row.block_sum[block] = sum(weights, count);
        total += row.block_sum[block];
    }
    return total;
}

// The first token in the order of ids at which the running sum of kept weights exceeds
// uniform * (their sum); the last kept token if rounding lets none do so.
static int64_t draw(const Row& row, const Cut& cut, float min_weight, double uniform) {
    const double target = uniform * sum_blocks(row, cut, min_weight);
    int64_t block = 0;
    double before = 0.0, after = 0.0;
    for (int64_t i = 0; i < row.blocks && after <= target; ++i) {
        if (row.block_sum[i] == 0.0f) continue;
        before = after;
        after += row.block_sum[i];
        block = i;
    }
    float weights[kBlock];
    const int count = weigh_block(row, block, cut, weights);
    int chosen = 0;
    for (int i = 0; i < count && before <= target; ++i) {
        if (weights[i] == 0.0f || weights[i] < min_weight) continue;
        before += weights[i];
        chosen = i;
    }
    return block * kBlock + chosen;
}

// The logits of row r with penalties, biases and bans; the model's own row where it has none.
static SampleStatus edit(const SampleArgs& args, int64_t r, Row& row) {
    if (!args.seen_start) return SampleStatus::kSampled;
    const int64_t *seen = args.seen_start + r, *bias = args.bias_start + r;
    const int64_t* allowed = args.allowed_start + r;
    if (seen[0] == seen[1] && bias[0] == bias[1] && allowed[0] == allowed[1]) {
        return SampleStatus::kSampled;
    }
    if (has_nan(row.values, row.size)) return SampleStatus::kNotANumber;
    if (allowed[0] == allowed[1]) {
        std::memcpy(row.edited, row.values, sizeof(float) * row.size);
    } else {
        for (int64_t i = 0; i < row.size; ++i) row.edited[i] = -kInfinity;
        for (int64_t i = allowed[0]; i < allowed[1]; ++i) {
            row.edited[args.allowed_ids[i]] = row.values[args.allowed_ids[i]];
        }
    }
    row.values = row.edited;
    const float* reals = args.reals + r * kSampleReals;
    for (int64_t i = seen[0]; i < seen[1]; ++i) {
        const int32_t* entry = args.seen + 3 * i;
        float& logit = row.edited[entry[0]];
        if (entry[1] > 0 || entry[2]) {
            logit = logit > 0.0f ? logit / reals[kRepetition] : logit * reals[kRepetition];
        }
        if (entry[1] > 0) {
            logit = logit - reals[kFrequency] * static_cast<float>(entry[1]) - reals[kPresence];
        }
    }
    for (int64_t i = bias[0]; i < bias[1]; ++i) {
        float& logit = row.edited[args.bias_ids[i]];
        // Set, not added: a ban holds for a logit of +infinity too.
        logit = args.bias_values[i] == -kInfinity ? -kInfinity : logit + args.bias_values[i];
    }
    return SampleStatus::kSampled;
}

// The token of a row whose temperature is above 0.
static SampleStatus sample_filtered(const SampleArgs& args, int64_t r, Row& row, int64_t& token) {
    const float* reals = args.reals + r * kSampleReals;
    const int64_t* integers = args.integers + r * kSampleIntegers;
    SampleStatus status = scan(row);
    if (status == SampleStatus::kSampled && row.max == kInfinity) {
        // All the probability is shared equally by the logits of +infinity.
        for (int64_t i = 0; i < row.size; ++i) {
            row.edited[i] = row.values[i] == kInfinity ? 0.0f : -kInfinity;
        }
        row.values = row.edited;
        status = scan(row);
    }
    if (status != SampleStatus::kSampled) return status;

    const float temperature = reals[kTemperature];
    row.inverse_temperature = 1.0f / temperature;
    // The logit whose weight is e^exponent, in double: float32 would round the sum too far.
    const auto logit_at = [&](double exponent) {
        const double value = row.max + exponent * temperature;
        return value > -FLT_MAX ? static_cast<float>(value) : -FLT_MAX;
    };
    Cut cut = {logit_at(kSmallestExponent), row.size};
    const int64_t top_k = integers[kTopK];
    if (top_k > 0 && top_k < row.size) {
        const float lower = top_k <= row.blocks ? ranked_block_max(row, top_k) : cut.value;
        cut = narrow(row, cut, Measure::kCount, static_cast<double>(top_k), lower);
    }
    const float top_p = reals[kTopP];
    if (top_p < 1.0f) {
        const double total = sum_blocks(row, cut, 0.0f);
        // Tokens that weigh less than this are together less than what top-p drops.
        const double smallest = (1.0 - top_p) * total / static_cast<double>(row.size);
        const float lower = logit_at(std::log(smallest) - kMargin);
        cut = narrow(row, cut, Measure::kWeight, top_p * total, lower);
    }
    const float min_p = reals[kMinP];
    if (min_p > 0.0f) {
        const float lower = logit_at(std::log(static_cast<double>(min_p)) - kMargin);
        if (lower > cut.value) cut = {lower, row.size};
    }
    const uint64_t seed = static_cast<uint64_t>(integers[kSeed]);
    const double uniform =
        0x1p-53 * static_cast<double>(random_bits(seed, static_cast<uint64_t>(integers[kPosition]),
                                                  static_cast<uint32_t>(integers[kSampleIndex])));
    token = draw(row, cut, min_p, uniform);
    return SampleStatus::kSampled;
}

static void sample_row(const SampleArgs& args, int64_t r, char* workspace) {
    const int64_t source = args.logits_rows ? args.logits_rows[r] : r;
    Row row = make_row(args.logits + source * args.logits_stride, args.vocab, workspace);
    int64_t token = -1;
    SampleStatus status = edit(args, r, row);
    if (status == SampleStatus::kSampled) {
        const float temperature = args.reals[r * kSampleReals + kTemperature];
        status = temperature == 0.0f ? argmax(row.values, row.size, token)
                                     : sample_filtered(args, r, row, token);
    }
    args.token_ids[r] = token;
    args.status[r] = static_cast<int32_t>(status);
}

// Largest first (heapsort, Williams, 1964).
static void sort_keys(uint64_t* keys, int64_t count) {
    const auto sift = [keys](int64_t root, int64_t end) {
        for (int64_t child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && keys[child + 1] < keys[child]) ++child;
            if (keys[root] <= keys[child]) return;
            const uint64_t key = keys[root];
            keys[root] = keys[child];
            keys[child] = key;
        }
    };
    for (int64_t root = count / 2; root-- > 0;) sift(root, count);
    for (int64_t end = count; end-- > 1;) {
        const uint64_t key = keys[0];
        keys[0] = keys[end];
        keys[end] = key;
        sift(0, end);
    }
}

// The `count` largest logits as keys, in order, at the front of row.keys.
static void top_keys(const Row& row, int64_t count) {
    const float lower = count <= row.blocks ? ranked_block_max(row, count) : -kInfinity;
    const int64_t found = find_candidates(row, lower);
    make_keys(row, found);
    select_key(row, row.keys, found, Measure::kCount, static_cast<double>(count));
    sort_keys(row.keys, count);
}

static void log_probs_row(const LogProbsArgs& args, int64_t r, char* workspace) {
    const int64_t source = args.logits_rows ? args.logits_rows[r] : r;
    Row row = make_row(args.logits + source * args.logits_stride, args.vocab, workspace);
    int64_t* top_ids = args.top_ids + r * args.top_n;
    float* top_logprobs = args.top_logprobs + r * args.top_n;
    if (scan(row) != SampleStatus::kSampled) {
        args.logprobs[r] = __builtin_nanf("");
        args.ranks[r] = 1;
        for (int64_t i = 0; i < args.top_n; ++i) {
            top_ids[i] = i;
            top_logprobs[i] = __builtin_nanf("");
        }
        return;
    }
    const float chosen = row.values[args.token_ids[r]];
    double total = 0.0;
    int64_t larger = 0;
    float weights[kBlock];
    for (int64_t block = 0; block < row.blocks; ++block) {
        const float* x = row.values + block * kBlock;
        const int count = row.block_size(block);
        if (row.max < kInfinity) {
            exponentials(row, x, count, weights);
        } else {
            for (int i = 0; i < count; ++i) weights[i] = x[i] == kInfinity ? 1.0f : 0.0f;
        }
        total += sum(weights, count);
        int above = 0;
        for (int i = 0; i < count; ++i) above += x[i] > chosen;
        larger += above;
    }
    const double log_total = std::log(total);
    const auto logprob = [&](float x) {
        const double below = x == row.max ? 0.0 : static_cast<double>(x) - row.max;
        return static_cast<float>(below - log_total);
    };
    args.logprobs[r] = logprob(chosen);
    args.ranks[r] = 1 + larger;
    if (args.top_n > 0) top_keys(row, args.top_n);
    for (int64_t i = 0; i < args.top_n; ++i) {
        const Cut token = cut_at(row.keys[i]);
        top_ids[i] = token.id;
        top_logprobs[i] = logprob(token.value);
    }
}

// Gives rows out one by one, since their costs differ; each thread has a workspace.
template <typename Args, typename Body>
static void for_each_row(const Args& args, const Body& body) {
    const int64_t stride = sampling_workspace_bytes(args.vocab);
    SharedCounter next;
    run_together(static_cast<int>(args.workers), [&](int rank) {
        for (int64_t r; (r = next.take()) < args.count;) {
            body(args, r, args.workspace + rank * stride);
        }
    });
}

void sample(const SampleArgs& args) { for_each_row(args, sample_row); }

void log_probs(const LogProbsArgs& args) { for_each_row(args, log_probs_row); }

}  // namespace sglite::cpu::SGLITE_CPU_PATH
