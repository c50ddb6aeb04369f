// Log-probabilities and ranks of tokens, and the most probable tokens of each row.
#include "cuda/launchers.h"
#include "cuda/sampling_plan.cuh"
#include "cuda/sampling_select.cuh"

namespace sglite::cuda {

namespace {

struct Totals {
    uint64_t weight = 0;
    uint32_t larger = 0;  // logits above the chosen one

    __device__ void add(const Totals& other) {
        weight += other.weight;
        larger += other.larger;
    }
    __device__ Totals of_lane(int lane) const {
        return {shuffle(weight, lane), shuffle(larger, lane)};
    }
};

// Emits, in the order of ids, the first tokens whose logit is -infinity as entries from `place` on.
// Called by one block; reads the row in global memory.
template <typename Emit>
__device__ void emit_impossible(const Row& row, const float* logits, int64_t vocab, int64_t place,
                                int64_t end, const Emit& emit) {
    for (int64_t start = 0; start < vocab && place < end; start += kRowThreads) {
        const int64_t id = start + threadIdx.x;
        const bool found = id < vocab && logits[id] == -kInfinity;
        uint64_t total;
        const int64_t at = place + static_cast<int64_t>(sum_before(row.shared, found, total));
        if (found && at < end) emit(at, static_cast<uint32_t>(id), -kInfinity);
        place += static_cast<int64_t>(total);
    }
}

template <bool kFits>
__global__ __launch_bounds__(kRowThreads, kResidentBlocks) void log_probs_kernel(LogProbsArgs args,
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
    const Look look = load_row(row, logits, args.vocab);
    let_next_kernel_start();
    const Summary summary = look.summary(row);
    cluster_wait();
    const Summary all = gather_all(row, summary);

    int64_t* top_ids = args.top_ids + r * args.top_n;
    float* top_logprobs = args.top_logprobs + r * args.top_n;
    if (all.has_nan || all.best == 0) {
        const float nan = value_of(0xFFFFFFFFu);
        if (!row.leads()) return;
        for (int64_t i = threadIdx.x; i < args.top_n; i += kRowThreads) {
            top_ids[i] = i;
            top_logprobs[i] = nan;
        }
        if (threadIdx.x == 0) {
            args.logprobs[r] = nan;
            args.ranks[r] = 1;
        }
        return;
    }

    row.max = key_value(all.best);
    const int64_t token = args.token_ids[r];
    const float chosen = token >= 0 && token < args.vocab ? logits[token] : value_of(0xFFFFFFFFu);
    const bool certain = row.max == kInfinity;  // shared equally by all that are +infinity
    Totals mine;
    for_each_logit(row, [&](float x, uint32_t) {
        mine.weight += row.fixed(certain ? static_cast<float>(x == kInfinity) : row.weight(x));
        mine.larger += x > chosen;
    });
    const Totals totals = gather_all(row, mine);
    const double log_total =
        log(static_cast<double>(totals.weight) / static_cast<double>(1ull << row.fraction_bits));
    const auto logprob = [&](float x) {
        const double below = x == row.max ? 0.0 : static_cast<double>(x) - row.max;
        return static_cast<float>(below - log_total);
    };
    if (row.leads() && threadIdx.x == 0) {
        args.logprobs[r] = logprob(chosen);
        args.ranks[r] = 1 + totals.larger;
    }
    if (args.top_n == 0) return;

    const auto emit = [&](int64_t place, uint32_t id, float x) {
        top_ids[place] = id;
        top_logprobs[place] = logprob(x);
    };
    const uint32_t wanted = static_cast<uint32_t>(args.top_n);
    uint32_t listed = list_first(row, all, look.best, wanted);
    cluster_wait();
    if (listed > kListSize) {
        clear_list(row);
        const uint64_t cut = narrow(row, 0, Measure::kCount, wanted, all.least);
        for_each_logit(row, [&](float x, uint32_t id) {
            if (x > -kInfinity && token_key(x, id) >= cut) list_token(row, x, id);
        });
        cluster_barrier();
        listed = wanted;
    }
    if (!row.leads()) return;
    const Listed own = rank_list(row, listed);
    if (threadIdx.x < listed && own.before < wanted) {
        emit(own.before, key_id(own.key), key_value(own.key));
    }
    if (listed < wanted) emit_impossible(row, logits, args.vocab, listed, wanted, emit);
}

}  // namespace

void log_probs(const LogProbsArgs& args, Stream stream) {
    launch_rows<log_probs_kernel<true>, log_probs_kernel<false>>("log_probs", args, stream);
}

int64_t sampling_workspace_bytes(int64_t vocab, int64_t rows, int device) {
    constexpr const char* kOp = "sampling_workspace";
    const RowLimits limits = row_limits(kOp, device);
    int64_t bytes = 0;
    // A smaller batch may be split into more blocks for each row.
    for (int64_t count = 1; count <= rows;
         count = count < rows && count * 2 > rows ? rows : count * 2) {
        bytes = max(bytes, spilled_bytes(limits, plan_rows(limits, count, vocab), count));
    }
    return bytes;
}

}  // namespace sglite::cuda
