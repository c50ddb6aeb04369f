// Finding the first so many tokens of a row without sorting it. Histograms narrow the range of
// logits down to the one that the last wanted token has, until the tokens in it fit a short list,
// in which each is compared with each.
#pragma once

#include "cuda/sampling_row.cuh"

namespace sglite::cuda {

// By what tokens are measured: how many they are, or the sum of their weights.
enum class Measure { kCount, kWeight };

// Intervals of logits from the largest (bin 0) down: of equal width, or, where `by_key`, of equally
// many different numbers, which splits any range that holds more than one.
struct Bins {
    bool by_key;
    float half_top, scale;
    float bottom;
    uint32_t top_key;
    int shift;

    __device__ Bins(float top, float bottom, bool by_key)
        : by_key(by_key), half_top(top * 0.5f), bottom(bottom), top_key(value_key(top)) {
        // Halves, whose difference is finite.
        scale = fminf(kBins / (half_top - bottom * 0.5f), FLT_MAX);
        const uint32_t range = top_key - value_key(bottom);
        shift = max(0, 32 - __clz(static_cast<int>(range)) - 10);
    }
    __device__ int operator()(float x) const {
        if (by_key) return static_cast<int>((top_key - value_key(x)) >> shift);
        return static_cast<int>(fminf((half_top - x * 0.5f) * scale, kBins - 1));
    }
    // A logit that is surely not above any of the bin's.
    __device__ float floor(int bin) const {
        if (by_key) {
            const uint64_t below = (static_cast<uint64_t>(bin) + 1) << shift;
            return below > top_key - value_key(bottom)
                       ? bottom
                       : value_of(top_key - static_cast<uint32_t>(below) + 1);
        }
        constexpr float kMargin = 0.01f;  // many times what rounding moves a logit
        return fmaxf(bottom, 2.0f * (half_top - (bin + 1 + kMargin) / scale));
    }
    // About the largest logit of the bin.
    __device__ float top(int bin) const {
        return by_key ? value_of(top_key - (static_cast<uint32_t>(bin) << shift))
                      : 2.0f * (half_top - bin / scale);
    }
};

__device__ inline void clear_bins(const Row& row) {
    for (int i = threadIdx.x; i < kBins; i += kRowThreads) row.shared->bins[i] = 0;
}

// The bin in which, from bin 0 on, amount(total of all bins) is reached, kBins if it never is.
// mass(bin, sum) says what a bin's number stands for. The bins of all blocks are complete, and stay
// as they are until the next barrier of the cluster.
template <typename Amount, typename Mass>
__device__ inline int find_bin(const Row& row, const Amount& amount, const Mass& mass) {
    constexpr int kEach = kBins / kRowThreads;
    uint64_t masses[kEach] = {}, sum = 0;
    const int first = threadIdx.x * kEach;
    uint64_t sums[kEach] = {};
    for (unsigned rank = 0; rank < row.blocks; ++rank) {
        const auto part = load_vector<kEach>(cluster_shared(row.shared->bins, rank) + first);
        for (int i = 0; i < kEach; ++i) sums[i] += part[i];
    }
    for (int i = 0; i < kEach; ++i) {
        masses[i] = sums[i] ? mass(first + i, sums[i]) : 0;
        sum += masses[i];
    }
    uint64_t total;
    uint64_t before = sum_before(row.shared, sum, total);
    const uint64_t wanted = amount(total);
    if (before < wanted && before + sum >= wanted) {
        int i = 0;
        for (; i < kEach - 1 && before + masses[i] < wanted; ++i) before += masses[i];
        row.shared->bin = first + i;
    }
    __syncthreads();
    return total < wanted ? kBins : row.shared->bin;
}

// Puts a token on the list of the cluster's first block, as long as there is room.
__device__ inline void list_token(const Row& row, float x, uint32_t id) {
    const uint32_t place = atomicAdd(cluster_shared(&row.shared->listed, 0), 1u);
    if (place < kListSize) *cluster_shared(&row.shared->keys[place], 0) = token_key(x, id);
}

// Puts tokens on the list that have the `count` first ones among them, if that is well possible:
// those that are not below the count-th largest of the threads' largest logits, about. `best` is
// the largest logit of the thread, -infinity for none. The bins are clear. Returns how many there
// are; the list is complete if they are no more than it holds. Half a barrier is left open:
// cluster_wait.
__device__ inline uint32_t list_first(Row& row, const Summary& all, float best, uint32_t count) {
    const Bins bins(row.max, all.least_best, row.max == kInfinity);
    if (best > -kInfinity) atomicAdd(&row.shared->bins[bins(best)], 1u);
    cluster_barrier();
    const int bin = find_bin(
        row, [&](uint64_t) { return uint64_t{count}; }, [](int, uint64_t sum) { return sum; });
    const float lowest = bin < kBins ? bins.floor(bin) : -FLT_MAX;
    for_each_logit(row, [&](float x, uint32_t id) {
        if (x >= lowest) list_token(row, x, id);
    });
    cluster_barrier();
    const uint32_t listed = *cluster_shared(&row.shared->listed, 0);
    cluster_arrive();
    return listed;
}

// Of each entry of the list the number of entries before it and the sum of their weights. Called by
// the first block; entry i is thread i's.
struct Listed {
    uint64_t key = 0, weight = 0, weight_before = 0;
    uint32_t before = 0;
    float weight_value = 0.0f;
};

__device__ inline Listed rank_list(const Row& row, uint32_t count) {
    RowShared* shared = row.shared;
    Listed own;
    if (threadIdx.x < count) {
        own.key = shared->keys[threadIdx.x];
        own.weight_value = row.weight(key_value(own.key));
        if (row.max == kInfinity) own.weight_value = key_value(own.key) == kInfinity;
        own.weight = row.fixed(own.weight_value);
    } else {
        shared->keys[threadIdx.x] = 0;  // so that pairs can be read
    }
    shared->weights[threadIdx.x] = own.weight;
    __syncthreads();
    if (threadIdx.x / kWarp * kWarp < count) {
        for (uint32_t i = 0; i < count; i += 2) {
            const auto keys = load_vector<2>(shared->keys + i);
            const auto weights = load_vector<2>(shared->weights + i);
            for (int j = 0; j < 2; ++j) {
                const bool is_before = keys[j] > own.key;
                own.before += is_before;
                own.weight_before += is_before ? weights[j] : 0;
            }
        }
    }
    return own;
}

// What a bin of the histogram holds, exactly.
struct BinContent {
    uint64_t above = 0, inside = 0, total = 0;  // the last of all bins
    float most = -kInfinity, least = kInfinity;
    uint32_t count = 0;

    __device__ void add(const BinContent& other) {
        above += other.above;
        inside += other.inside;
        total += other.total;
        most = fmaxf(most, other.most);
        least = fminf(least, other.least);
        count += other.count;
    }
    __device__ BinContent of_lane(int lane) const {
        BinContent other;
        other.above = shuffle(above, lane);
        other.inside = shuffle(inside, lane);
        other.total = shuffle(total, lane);
        other.most = shuffle(most, lane);
        other.least = shuffle(least, lane);
        other.count = shuffle(count, lane);
        return other;
    }
};

// Tokens whose key is not below the cut's are kept; 0 keeps all.
__device__ inline bool keeps(uint64_t cut, float x, uint32_t id) {
    return cut == 0 || token_key(x, id) >= cut;
}

// Empties the list; no token is put on it until two barriers of the cluster from here.
__device__ inline void clear_list(const Row& row) {
    if (row.leads() && threadIdx.x == 0) row.shared->listed = 0;
}

// Tells all blocks the cut; they know it after the next barrier of the cluster.
__device__ inline void publish_cut(const Row& row, uint64_t cut) {
    for (unsigned rank = 0; rank < row.blocks; ++rank) {
        *cluster_shared(&row.shared->cut, rank) = cut;
    }
}

// The cut that keeps the fewest first ones of the tokens that `cut` keeps whose measure reaches
// amount(measure of them all); `cut` itself if those from `bottom` up do not reach it. What lies
// below `bottom` measures nothing. The list is empty, before and afterwards.
template <Measure kMeasure, typename Amount>
__device__ inline uint64_t narrow(Row& row, uint64_t cut, float bottom, const Amount& amount) {
    const auto measure_of = [&](float x) {
        return kMeasure == Measure::kCount ? uint64_t{1} : row.fixed(row.weight(x));
    };
    const float quantum = static_cast<float>(1 << row.quantum_bits);
    float top = row.max;
    uint64_t done = 0;   // what lies above `top`
    uint64_t total = 0;  // once it is known exactly
    for (bool by_key = top == kInfinity;; by_key = true) {
        const Bins bins(top, bottom, by_key);
        const auto belongs = [&](float x, uint32_t id) {
            return x >= bottom && x <= top && keeps(cut, x, id);
        };
        clear_bins(row);
        __syncthreads();
        for_each_logit(row, [&](float x, uint32_t id) {
            if (!belongs(x, id)) return;
            const int bin = bins(x);
            uint32_t part = 1;
            if constexpr (kMeasure == Measure::kWeight) {
                part = static_cast<uint32_t>(
                    fminf(exp2_fast((x - bins.top(bin)) * row.scale), 1.0f) * quantum);
            }
            atomicAdd(&row.shared->bins[bin], part);
        });
        cluster_barrier();
        int bin = find_bin(
            row, [&](uint64_t sum) { return amount(total ? total : sum) - done; },
            [&](int i, uint64_t sum) {
                if constexpr (kMeasure == Measure::kCount) return sum;
                const float ones = row.weight(bins.top(i)) * (static_cast<float>(sum) / quantum);
                return static_cast<uint64_t>(ones * static_cast<float>(1ull << row.fraction_bits));
            });
        bin = min(bin, kBins - 1);
        // The sums of weights by bins were rounded: the exact ones may reach the amount next door.
        BinContent content;
        uint64_t wanted;
        for (;;) {
            BinContent mine;
            for_each_logit(row, [&](float x, uint32_t id) {
                if (!belongs(x, id)) return;
                const int at = bins(x);
                const uint64_t part = measure_of(x);
                mine.total += part;
                if (at < bin) {
                    mine.above += part;
                } else if (at == bin) {
                    mine.inside += part;
                    mine.most = fmaxf(mine.most, x);
                    mine.least = fminf(mine.least, x);
                    ++mine.count;
                    list_token(row, x, id);
                }
            });
            content = gather_all(row, mine);
            if (total == 0) total = content.total;
            wanted = amount(total) - done;
            if (content.above >= wanted) {
                --bin;
            } else if (content.above + content.inside >= wanted) {
                break;
            } else if (++bin == kBins) {
                clear_list(row);
                cluster_barrier();
                return cut;
            }
            clear_list(row);
            cluster_barrier();
        }
        wanted -= content.above;
        if (content.count <= kListSize) {
            if (row.leads()) {
                const Listed own = rank_list(row, content.count);
                const bool counts = kMeasure == Measure::kCount;
                const uint64_t before = counts ? own.before : own.weight_before;
                const uint64_t part = counts ? 1 : own.weight;
                if (threadIdx.x < content.count && before < wanted && before + part >= wanted) {
                    publish_cut(row, own.key);
                }
            }
        } else if (content.most == content.least) {
            const float tie = content.most;
            const uint64_t part = measure_of(tie), kept = (wanted + part - 1) / part;
            locate(
                row,
                [&](float x, uint32_t id) {
                    return static_cast<uint64_t>(x == tie && keeps(cut, x, id));
                },
                [&](uint64_t) { return kept - 1; },
                [&](uint32_t id) { publish_cut(row, token_key(tie, id)); });
        } else {
            done += content.above;
            top = content.most;
            bottom = content.least;
            clear_list(row);
            cluster_barrier();
            continue;
        }
        clear_list(row);
        cluster_barrier();
        return row.shared->cut;
    }
}

}  // namespace sglite::cuda
