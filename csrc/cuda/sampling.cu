// Choosing the next token of each row of logits. A cluster of blocks reads the row once and keeps
// it in shared memory; which passes follow depends on the row's own parameters, read on the device.
#include "cuda/launchers.h"
#include "cuda/sampling_plan.cuh"
#include "cuda/sampling_select.cuh"
#include "philox.h"

namespace sglite::cuda {

namespace {

// A top-k up to here is looked for by the largest logits of the threads.
constexpr int64_t kFew = 256;

// The whole part of total * bits / 2^53. A running sum of integers exceeds the one where it exceeds
// the other.
__device__ uint64_t share(uint64_t total, uint64_t bits) {
    return multiply_high(total, bits << 11);
}

// The smallest amount that is at least top_p * total.
__device__ uint64_t share_up(uint64_t total, float top_p) {
    const double amount = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    return max(static_cast<uint64_t>(amount), uint64_t{1});
}

// Penalties, biases and bans of row r, on the slice. `logits` is the model's row.
__device__ void edit(const SampleArgs& args, int64_t r, const Row& row, const float* logits) {
    const auto place = [&](int64_t id) {
        const int64_t at = id - row.first;
        return at >= 0 && at < row.size && id < args.vocab ? static_cast<int>(at) : -1;
    };
    const int64_t *seen = args.seen_start + r, *bias = args.bias_start + r;
    const int64_t* allowed = args.allowed_start + r;
    __syncthreads();
    if (allowed[0] < allowed[1]) {
        for (int i = threadIdx.x; i < row.size; i += kRowThreads) row.values[i] = -kInfinity;
        __syncthreads();
        for (int64_t i = allowed[0] + threadIdx.x; i < allowed[1]; i += kRowThreads) {
            const int at = place(args.allowed_ids[i]);
            if (at >= 0) row.values[at] = logits[args.allowed_ids[i]];
        }
        __syncthreads();
    }
    const float* reals = args.reals + r * kSampleReals;
    for (int64_t i = seen[0] + threadIdx.x; i < seen[1]; i += kRowThreads) {
        const int32_t* entry = args.seen + 3 * i;
        const int at = place(entry[0]);
        if (at < 0) continue;
        float logit = row.values[at];
        if (entry[1] > 0 || entry[2]) {
            logit = logit > 0.0f ? logit / reals[kRepetition] : logit * reals[kRepetition];
        }
        if (entry[1] > 0) {
            logit = subtract(logit, multiply(reals[kFrequency], static_cast<float>(entry[1])));
            logit = subtract(logit, reals[kPresence]);
        }
        row.values[at] = logit;
    }
    __syncthreads();
    // A token may have several biases; the same thread adds them, in their order.
    for (int64_t i = bias[0]; i < bias[1]; ++i) {
        const int at = place(args.bias_ids[i]);
        if (at < 0 || at % kRowThreads != static_cast<int>(threadIdx.x)) continue;
        const float value = args.bias_values[i];
        // Set, not added: a ban holds for a logit of +infinity too.
        row.values[at] = value == -kInfinity ? -kInfinity : add(row.values[at], value);
    }
    __syncthreads();
}

__device__ bool has_edits(const SampleArgs& args, int64_t r) {
    return args.seen_start && (args.seen_start[r] < args.seen_start[r + 1] ||
                               args.bias_start[r] < args.bias_start[r + 1] ||
                               args.allowed_start[r] < args.allowed_start[r + 1]);
}

// All the probability is shared equally by the logits of +infinity.
__device__ void share_among_infinite(Row& row, Summary& all, float& best) {
    __syncthreads();
    for (int i = threadIdx.x; i < row.size; i += kRowThreads) {
        row.values[i] = row.values[i] == kInfinity ? 0.0f : -kInfinity;
    }
    __syncthreads();
    best = best == kInfinity ? 0.0f : -kInfinity;
    row.max = all.least = all.least_best = 0.0f;
}

// Chooses among the `count` entries of the list, which hold the top_k first tokens.
template <typename Emit>
__device__ void choose_from_list(const Row& row, uint32_t count, uint32_t top_k, float top_p,
                                 float min_p, uint64_t bits, const Emit& emit) {
    const Listed own = rank_list(row, count);
    bool kept = threadIdx.x < count && own.before < top_k;
    if (top_p < 1.0f) {
        const uint64_t total = block_total(row.shared, kept ? own.weight : 0);
        kept = kept && own.weight_before < share_up(total, top_p);
    }
    const uint64_t weight = kept && own.weight_value >= min_p ? own.weight : 0;
    const uint64_t wanted = share(block_total(row.shared, weight), bits);
    row.shared->weights[threadIdx.x] = weight;
    __syncthreads();
    if (threadIdx.x / kWarp * kWarp >= count) return;
    // The complement of the id stands in a key's lower half.
    const uint32_t own_id = static_cast<uint32_t>(own.key);
    uint64_t before = 0;
    for (uint32_t i = 0; i < count; i += 2) {
        const auto keys = load_vector<2>(row.shared->keys + i);
        const auto weights = load_vector<2>(row.shared->weights + i);
        for (int j = 0; j < 2; ++j) {
            before += static_cast<uint32_t>(keys[j]) > own_id ? weights[j] : 0;
        }
    }
    if (wanted >= before && wanted < before + weight) emit(key_id(own.key));
}

template <bool kFits>
__global__ __launch_bounds__(kRowThreads, kResidentBlocks) void sample_kernel(SampleArgs args,
                                                                              RowPlan plan) {
    auto* shared = dynamic_shared<RowShared>();
    float* values = kFits ? reinterpret_cast<float*>(shared + 1)
                          : plan.spilled + static_cast<int64_t>(blockIdx.x) * plan.slice;
    Row row = make_row(plan, values, shared, args.vocab);
    const int64_t r = blockIdx.x / row.blocks;
    clear_bins(row);
    if (threadIdx.x == 0) shared->listed = 0;
    cluster_arrive();

    wait_for_previous_kernel();
    const int64_t source = args.logits_rows ? args.logits_rows[r] : r;
    const float* logits = args.logits + source * args.logits_stride;
    Look look = load_row(row, logits, args.vocab);
    let_next_kernel_start();
    if (has_edits(args, r)) {
        const bool had_nan = look.has_nan;
        edit(args, r, row, logits);
        look = look_again(row);
        look.has_nan |= had_nan;
    }
    Summary summary = look.summary(row);
    cluster_wait();
    Summary all = gather_all(row, summary);

    const auto finish = [&](SampleStatus status, int64_t token) {
        args.token_ids[r] = token;
        args.status[r] = static_cast<int32_t>(status);
    };
    const float* reals = args.reals + r * kSampleReals;
    const int64_t* integers = args.integers + r * kSampleIntegers;
    const float temperature = reals[kTemperature];
    if (all.has_nan || all.best == 0 || temperature == 0.0f) {
        if (row.leads() && threadIdx.x == 0) {
            if (all.has_nan) {
                finish(SampleStatus::kNotANumber, -1);
            } else if (all.best == 0) {
                finish(SampleStatus::kNothingLeft, -1);
            } else {
                finish(SampleStatus::kSampled, key_id(all.best));
            }
        }
        return;
    }

    const auto emit = [&](uint32_t token) { finish(SampleStatus::kSampled, token); };
    const int64_t top_k = integers[kTopK];
    const float top_p = reals[kTopP], min_p = reals[kMinP];
    const uint64_t bits = random_bits(static_cast<uint64_t>(integers[kSeed]),
                                      static_cast<uint64_t>(integers[kPosition]),
                                      static_cast<uint32_t>(integers[kSampleIndex]));
    row.max = key_value(all.best);
    row.scale = kLog2E * (1.0f / temperature);
    float best = look.best;
    if (row.max == kInfinity) share_among_infinite(row, all, best);
    if (top_k > 0 && top_k <= kFew) {
        const uint32_t listed = list_first(row, all, best, static_cast<uint32_t>(top_k));
        cluster_wait();
        if (listed <= kListSize) {
            if (row.leads()) {
                choose_from_list(row, listed, static_cast<uint32_t>(top_k), top_p, min_p, bits,
                                 emit);
            }
            return;
        }
        clear_list(row);
    }
    // Weights are 0 below this.
    const float floor = row.max - static_cast<float>(row.fraction_bits + 1) / row.scale;
    const float bottom = fmaxf(all.least, floor);
    uint64_t cut = 0;
    if (top_k > 0 && top_k < args.vocab) {
        cut = narrow<Measure::kCount>(row, cut, bottom,
                                      [&](uint64_t) { return static_cast<uint64_t>(top_k); });
    }
    if (top_p < 1.0f) {
        cut = narrow<Measure::kWeight>(row, cut, bottom,
                                       [&](uint64_t total) { return share_up(total, top_p); });
    }
    locate(
        row,
        [&](float x, uint32_t id) {
            const float weight = row.weight(x);
            return weight >= min_p && keeps(cut, x, id) ? row.fixed(weight) : 0;
        },
        [&](uint64_t total) { return share(total, bits); }, emit);
}

}  // namespace

void sample(const SampleArgs& args, Stream stream) {
    launch_rows<sample_kernel<true>, sample_kernel<false>>("sample", args, stream);
}

}  // namespace sglite::cuda
