// One row of logits, held by a cluster of blocks: each keeps a slice of it in shared memory, and
// the blocks tell each other what they find. Everything that decides about tokens is computed with
// integers, so that no result depends on the order of additions or on how a row is split.
#pragma once

#include <cfloat>

#include "cuda/primitives.cuh"
#include "kernel_args.h"

namespace sglite::cuda {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kResidentBlocks = 2;  // of a processor, for the sake of registers
constexpr int kMostBlocks = 8;      // of a cluster
constexpr int kBins = 1024;
constexpr int kListSize = kRowThreads;  // a thread for each entry
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// A token's logit and id as one number: of two tokens the one that comes first (larger logit, then
// lower id) has the larger key. No key is 0.
__device__ inline uint32_t value_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 and 0 are the same logit
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline float value_of(uint32_t key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}
__device__ inline uint64_t token_key(float value, uint32_t id) {
    return static_cast<uint64_t>(value_key(value)) << 32 | (0xFFFFFFFFu - id);
}
__device__ inline float key_value(uint64_t key) {
    return value_of(static_cast<uint32_t>(key >> 32));
}
__device__ inline uint32_t key_id(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

// Beside the logits in each block's shared memory.
struct RowShared {
    uint64_t keys[kListSize];  // of tokens that wait for their order; in the cluster's first block
    union {                    // never needed at the same time
        uint32_t bins[kBins];
        uint64_t weights[kListSize];  // of the keys
    };
    alignas(16) unsigned char inbox[2][kMostBlocks][48];  // what each block says
    alignas(16) unsigned char warps[kRowWarps][48];       // what each warp says
    uint64_t cut;
    int bin;
    uint32_t listed;
};

// How kernels that are launched for rows of a vocabulary split them.
struct RowPlan {
    int cluster;        // blocks for each row
    int slice;          // logits of a block, a multiple of 4
    int fraction_bits;  // of weights: integers from 0 to 2^fraction_bits
    int quantum_bits;   // of weights relative to their bin's largest
    float* spilled;     // [rows, cluster, slice], where slices do not fit into shared memory
};

struct Row {
    float* values;   // the slice; padded with -infinity to a multiple of 4
    int size;        // with padding
    uint32_t first;  // id of values[0]
    RowShared* shared;
    unsigned rank, blocks;
    int mail;     // which inbox is next
    float max;    // over the whole row
    float scale;  // log2(e) / temperature
    int fraction_bits, quantum_bits;

    __device__ float exponent(float x) const { return (x - max) * scale; }
    __device__ float weight(float x) const { return exp2_fast(exponent(x)); }
    // The whole part of weight * 2^fraction_bits, for sums that are exact; `weight` is in [0, 1].
    // By shifts, since conversions to 64 bits are slow.
    __device__ uint64_t fixed(float weight) const {
        const uint32_t bits = __float_as_uint(weight);
        const uint64_t mantissa = (bits & 0x7FFFFFu) | 0x800000u;
        return mantissa << (fraction_bits - 23) >> min(127u - (bits >> 23), 63u);
    }
    __device__ bool leads() const { return rank == 0; }
};

__device__ inline Row make_row(const RowPlan& plan, float* values, RowShared* shared,
                               int64_t vocab) {
    Row row{};
    row.shared = shared;
    row.blocks = cluster_size();
    row.rank = blockIdx.x % row.blocks;
    row.values = values;
    const int64_t first = static_cast<int64_t>(row.rank) * plan.slice;
    const int64_t left = vocab - first;
    row.first = static_cast<uint32_t>(first);
    row.size = static_cast<int>(left <= 0           ? 0
                                : left < plan.slice ? (left + 3) / 4 * 4
                                                    : plan.slice);
    row.fraction_bits = plan.fraction_bits;
    row.quantum_bits = plan.quantum_bits;
    row.scale = kLog2E;
    return row;
}

// Calls body(x, id) for each logit of the slice.
template <typename Body>
__device__ inline void for_each_logit(const Row& row, const Body& body) {
    for (int i = threadIdx.x * 4; i < row.size; i += kRowThreads * 4) {
        const auto quad = load_vector<4>(row.values + i);
        for (int j = 0; j < 4; ++j) body(quad[j], row.first + i + j);
    }
}

// ---- talking ----------------------------------------------------------------------------------

// Combines what all threads of the block give and hands it to all blocks of the cluster. The result
// has an entry for each block; it is good until the second call from here.
template <typename T>
__device__ inline const T* gather(Row& row, T value) {
    static_assert(sizeof(T) <= sizeof(row.shared->warps[0]));
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int mask = kWarp / 2; mask; mask /= 2) value.add(value.of_lane(lane ^ mask));
    if (lane == 0) *reinterpret_cast<T*>(row.shared->warps[warp]) = value;
    __syncthreads();
    auto* inbox = row.shared->inbox[row.mail];
    row.mail ^= 1;
    if (warp == 0) {
        value = *reinterpret_cast<T*>(row.shared->warps[lane % kRowWarps]);
        for (int mask = kRowWarps / 2; mask; mask /= 2) value.add(value.of_lane(lane ^ mask));
        if (lane < static_cast<int>(row.blocks)) {
            *reinterpret_cast<T*>(cluster_shared(&inbox[row.rank][0], lane)) = value;
        }
    }
    cluster_barrier();
    return reinterpret_cast<const T*>(inbox[0]);
}

template <typename T>
__device__ inline const T& from_block(const T* gathered, unsigned rank) {
    return *reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(gathered) +
                                       rank * sizeof(RowShared::inbox[0][0]));
}

template <typename T>
__device__ inline T gather_all(Row& row, const T& value) {
    const T* all = gather(row, value);
    T result = from_block(all, 0);
    for (unsigned rank = 1; rank < row.blocks; ++rank) result.add(from_block(all, rank));
    return result;
}

// Sums of the block's threads before this one; `total` of all. Ends with a barrier ahead of it.
__device__ inline uint64_t sum_before(RowShared* shared, uint64_t value, uint64_t& total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint64_t sum = value;
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, sum, delta);
        if (lane >= delta) sum += below;
    }
    __syncthreads();
    if (lane == kWarp - 1) *reinterpret_cast<uint64_t*>(shared->warps[warp]) = sum;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
    for (int other = 0; other < kRowWarps; ++other) {
        const uint64_t theirs = *reinterpret_cast<const uint64_t*>(shared->warps[other]);
        if (other < warp) before += theirs;
        total += theirs;
    }
    return before + sum - value;
}

__device__ inline uint64_t block_total(RowShared* shared, uint64_t value) {
    uint64_t total;
    sum_before(shared, value, total);
    return total;
}

// ---- first look -------------------------------------------------------------------------------

struct Summary {
    uint64_t best = 0;             // the key of the first token; 0 if all logits are -infinity
    float least = kInfinity;       // the smallest logit above -infinity
    float least_best = kInfinity;  // of the threads' largest logits above -infinity the smallest
    uint32_t has_nan = 0;

    __device__ void add(const Summary& other) {
        best = max(best, other.best);
        least = fminf(least, other.least);
        least_best = fminf(least_best, other.least_best);
        has_nan |= other.has_nan;
    }
    __device__ Summary of_lane(int lane) const {
        Summary other;
        other.best = shuffle(best, lane);
        other.least = shuffle(least, lane);
        other.least_best = shuffle(least_best, lane);
        other.has_nan = shuffle(has_nan, lane);
        return other;
    }
};

// What one thread sees, four logits at a time in ascending order.
struct Look {
    float best = -kInfinity, least = kInfinity;
    int best_at = 0;
    bool has_nan = false;

    __device__ void at(int i, const Vector<float, 4>& quad) {
        const float largest = fmaxf(fmaxf(quad[0], quad[1]), fmaxf(quad[2], quad[3]));
        if (largest > best) {
            best = largest;
            best_at = i;
        }
        for (int j = 0; j < 4; ++j) {
            has_nan |= quad[j] != quad[j];
            least = fminf(least, quad[j] == -kInfinity ? kInfinity : quad[j]);
        }
    }
    __device__ Summary summary(const Row& row) const {
        Summary result;
        result.least = least;
        result.has_nan = has_nan;
        if (best == -kInfinity) return result;
        int j = 0;
        while (j < 3 && row.values[best_at + j] != best) ++j;
        result.best = token_key(best, row.first + best_at + j);
        result.least_best = best;
        return result;
    }
};

// Reads the slice of a row of the model's logits into shared memory.
__device__ inline Look load_row(const Row& row, const float* logits, int64_t vocab) {
    constexpr int kAhead = 4, kStep = kRowThreads * 4;
    const float* from = logits + row.first;
    const int64_t left = vocab - row.first;
    const bool wide = reinterpret_cast<uintptr_t>(from) % 16 == 0;
    const auto fetch = [&](int i) {
        Vector<float, 4> quad{{-kInfinity, -kInfinity, -kInfinity, -kInfinity}};
        if (wide && i + 4 <= left) {
            quad = load_vector<4>(from + i);
        } else {
            for (int j = 0; j < 4; ++j) {
                if (i + j < left) quad[j] = from[i + j];
            }
        }
        return quad;
    };
    Look look;
    for (int start = threadIdx.x * 4; start < row.size; start += kAhead * kStep) {
        Vector<float, 4> quads[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (start + k * kStep < row.size) quads[k] = fetch(start + k * kStep);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int i = start + k * kStep;
            if (i < row.size) {
                store_vector(row.values + i, quads[k]);
                look.at(i, quads[k]);
            }
        }
    }
    return look;
}

__device__ inline Look look_again(const Row& row) {
    Look look;
    for (int i = threadIdx.x * 4; i < row.size; i += kRowThreads * 4) {
        look.at(i, load_vector<4>(row.values + i));
    }
    return look;
}

// ---- by id ------------------------------------------------------------------------------------

struct Sum {
    uint64_t value = 0;
    __device__ void add(const Sum& other) { value += other.value; }
    __device__ Sum of_lane(int lane) const { return {shuffle(value, lane)}; }
};

// Calls emit(id), in one thread of the cluster, for the first token in the order of ids at which
// the running sum of weigh(x, id) exceeds target(total).
template <typename Weigh, typename Target, typename Emit>
__device__ inline void locate(Row& row, const Weigh& weigh, const Target& target,
                              const Emit& emit) {
    constexpr int kStrip = kWarp * 4;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int chunk = (row.size + kRowWarps * kStrip - 1) / (kRowWarps * kStrip) * kStrip;
    const int begin = warp * chunk + lane * 4, end = min(row.size, (warp + 1) * chunk);
    uint64_t mine = 0;
    for (int i = begin; i < end; i += kStrip) {
        const auto quad = load_vector<4>(row.values + i);
        for (int j = 0; j < 4; ++j) mine += weigh(quad[j], row.first + i + j);
    }
    const Sum* sums = gather(row, Sum{mine});
    uint64_t before = 0, total = 0;
    for (unsigned rank = 0; rank < row.blocks; ++rank) {
        if (rank < row.rank) before += from_block(sums, rank).value;
        total += from_block(sums, rank).value;
    }
    const uint64_t wanted = target(total);
    if (wanted < before || wanted >= before + from_block(sums, row.rank).value) return;
    // Now the whole block looks into one warp's chunk.
    int found = 0;
    for (; found < kRowWarps - 1; ++found) {
        const uint64_t theirs = reinterpret_cast<const Sum*>(row.shared->warps[found])->value;
        if (wanted < before + theirs) break;
        before += theirs;
    }
    const int each = (chunk + kRowThreads - 1) / kRowThreads;
    const int first = min(found * chunk + static_cast<int>(threadIdx.x) * each, row.size);
    const int last = min(first + each, min((found + 1) * chunk, row.size));
    uint64_t own = 0;
    for (int i = first; i < last; ++i) own += weigh(row.values[i], row.first + i);
    before += sum_before(row.shared, own, total);
    if (wanted < before || wanted >= before + own) return;
    int i = first;
    for (; i < last - 1; ++i) {
        before += weigh(row.values[i], row.first + i);
        if (before > wanted) break;
    }
    emit(row.first + i);
}

}  // namespace sglite::cuda
