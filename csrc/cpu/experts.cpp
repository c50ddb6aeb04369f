// What a mixture of experts needs beside its linear layers: the choice of experts for each row, and
// the float32 sums of what they give.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// Whether an expert with the first logit comes before an earlier one with the second. A NaN counts
// as the largest.
static inline bool comes_before(float logit, float earlier) {
    return logit > earlier || (std::isnan(logit) && !std::isnan(earlier));
}

// The largest logits in descending order, with the experts that they are of.
static void select_largest(const float* logits, int64_t num_experts, int64_t top_k, float* largest,
                           int64_t* experts) {
    int64_t found = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
        const float logit = logits[expert];
        if (found == top_k && !comes_before(logit, largest[top_k - 1])) continue;
        int64_t place = found < top_k ? found++ : top_k - 1;
        for (; place > 0 && comes_before(logit, largest[place - 1]); --place) {
            largest[place] = largest[place - 1];
            experts[place] = experts[place - 1];
        }
        largest[place] = logit;
        experts[place] = expert;
    }
}

static void route_row(const RouteArgs& args, int64_t row) {
    const float* logits = args.logits + row * args.logits_stride;
    float* weights = args.weights + row * args.top_k;
    select_largest(logits, args.num_experts, args.top_k, weights, args.experts + row * args.top_k);
    const Vec largest = splat(weights[0]);
    Vec sums = splat(0.0f);
    int64_t i = 0;
    for (; i + Vec::kSize <= args.num_experts; i += Vec::kSize) {
        sums = sums + exp(load(logits + i) - largest);
    }
    if (i < args.num_experts) {
        const int rest = static_cast<int>(args.num_experts - i);
        sums = sums + exp(load_partial(logits + i, rest, -INFINITY) - largest);
    }
    const Vec total = splat(reduce_sum(sums));
    for (i = 0; i < args.top_k; i += Vec::kSize) {
        const int64_t rest = args.top_k - i;
        const int count = static_cast<int>(rest < Vec::kSize ? rest : Vec::kSize);
        store_partial(weights + i, exp(load_partial(weights + i, count) - largest) / total, count);
    }
    if (!args.normalize) return;
    float sum = weights[0];
    for (i = 1; i < args.top_k; ++i) sum += weights[i];
    for (i = 0; i < args.top_k; ++i) weights[i] /= sum;
}

void route(const RouteArgs& args) {
    parallel_for(args.rows, 1 + 4096 / (args.num_experts + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) route_row(args, row);
    });
}

void add_rows(const AddRowsArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t width = args.width;
        parallel_for(args.count, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* x = static_cast<const T*>(args.x) + row * width;
                float* total = args.total + args.rows[row] * width;
                const Vec factor = splat(args.factors[row]);
                int64_t i = 0;
                for (; i + Vec::kSize <= width; i += Vec::kSize) {
                    store(total + i, load(total + i) + load(x + i) * factor);
                }
                if (i < width) {
                    const int rest = static_cast<int>(width - i);
                    const Vec sum =
                        load_partial(total + i, rest) + load_partial(x + i, rest) * factor;
                    store_partial(total + i, sum, rest);
                }
            }
        });
    });
}

void round_values(const RoundValuesArgs& args) {
    visit_float_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        T* out = static_cast<T*>(args.out);
        parallel_for(args.count, 16384, [&](int64_t begin, int64_t end) {
            int64_t i = begin;
            for (; i + Vec::kSize <= end; i += Vec::kSize) store(out + i, load(args.x + i));
            if (i < end) {
                const int rest = static_cast<int>(end - i);
                store_partial(out + i, load_partial(args.x + i, rest), rest);
            }
        });
    });
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
