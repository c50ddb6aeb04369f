// The arithmetic and the memory traffic of paged attention's kernels: a tile of 64 keys out of
// pages into shared memory, scores, softmax, merging of parts. Both kernels do the same operations
// on a row in the same order.
#pragma once

#include "cuda/attention.h"
#include "cuda/primitives.cuh"

namespace sglite::cuda {

constexpr int kTile = kAttentionTile;

// What a kernel reads of AttentionArgs, made in attention_launch.cuh.
template <typename T>
struct AttentionView {
    T* out;
    const T* q;
    const T* k_cache;
    const T* v_cache;
    const int32_t* page_table;
    const int32_t* query_start;
    const int32_t* kv_lens;
    const int32_t* kv_end;
    const AttentionUnit* units;
    const UnitGroup* groups;  // of decode's units
    const AttentionCounts* counts;
    const int32_t* parts;
    int32_t* counters;
    float* records;
    int64_t out_token_stride, out_head_stride, q_token_stride, q_head_stride, slot_stride;
    int64_t record_rows;  // of one part: tokens * q_heads
    int works;            // decode's groups times kv_heads
    int table_width, page_shift, kv_heads, group, head_dim, window, stages;
    float score_factor;  // turns q . k into an exponent of 2, or into tanh's argument
    float cap_factor;    // turns tanh into an exponent of 2; 0: no soft cap
};

// Read past this processor's own cache, since it may be that the plan has just been written.
template <typename T>
__device__ int load_extend_units(const AttentionView<T>& view) {
    return __float_as_int(load_written_by_others(reinterpret_cast<const float*>(view.counts)).y);
}
__device__ inline int2 load_range(const UnitGroup* group) {
    const float4 loaded = load_written_by_others(reinterpret_cast<const float*>(&group->first));
    return {__float_as_int(loaded.x), __float_as_int(loaded.y)};
}
__device__ inline AttentionUnit load_unit(const AttentionUnit* unit) {
    const auto* from = reinterpret_cast<const float*>(unit);
    const float4 first = load_written_by_others(from), second = load_written_by_others(from + 4);
    return {__float_as_int(first.x),  __float_as_int(first.y),  __float_as_int(first.z),
            __float_as_int(first.w),  __float_as_int(second.x), __float_as_int(second.y),
            __float_as_int(second.z), __float_as_int(second.w)};
}

// Rows of kD 16-bit elements in shared memory, 16 bytes at a time, such that eight rows' chunks of
// one column lie in different banks.
template <int kD>
struct SharedRows {
    static constexpr int kChunks = kD / 8;
    static constexpr int kElements = kTile * kD;  // of a tile of keys or values

    __device__ static int at(int row, int chunk) {
        const int mask = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;
        return (row * kChunks + (chunk ^ mask)) * 8;
    }
};

// Copies tiles into shared memory. The page table is read one tile ahead.
template <typename T, int kD, int kThreads>
struct TileLoader {
    using Rows = SharedRows<kD>;
    // Threads side by side that copy one row.
    static constexpr int kColumns = Rows::kChunks == 12 ? 16 : Rows::kChunks;
    static constexpr int kRowsAtOnce = kThreads / kColumns;

    int slots[2];  // of the rows `lane` and `lane + 32` of the next tile
    int position;  // the tile's first one
    int begin, end, head;

    // Looks up where the tile's rows are.
    __device__ void look_up(const AttentionView<T>& view, int request) {
        const int lane = threadIdx.x % kWarp;
        const int32_t* table = view.page_table + static_cast<int64_t>(request) * view.table_width;
        for (int half = 0; half < 2; ++half) {
            const int key = position + half * kWarp + lane;
            const int inside = key & ((1 << view.page_shift) - 1);
            slots[half] = key >= begin && key < end
                              ? table[key >> view.page_shift] << view.page_shift | inside
                              : 0;
        }
    }

    __device__ void copy(const AttentionView<T>& view, T* keys, T* values) const {
        const int chunk = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
        const bool in_head = chunk * 8 < view.head_dim;
        const int64_t offset = static_cast<int64_t>(head) * view.head_dim + chunk * 8;
#pragma unroll
        for (int pass = 0; pass < kTile / kRowsAtOnce; ++pass) {
            const int row = pass * kRowsAtOnce + first_row;
            const int slot = shuffle(slots[pass * kRowsAtOnce / kWarp], row % kWarp);
            const int key = position + row;
            const bool valid = in_head && key >= begin && key < end;
            const int64_t from = valid ? slot * view.slot_stride + offset : 0;
            if (Rows::kChunks == kColumns || chunk < Rows::kChunks) {
                copy_async(keys + Rows::at(row, chunk), view.k_cache + from, valid);
                copy_async(values + Rows::at(row, chunk), view.v_cache + from, valid);
            }
        }
    }
};

// Queries of `kRows` rows from `first_row` on; zeros beyond `rows`.
template <typename T, int kD, int kRows>
__device__ void copy_queries(const AttentionView<T>& view, int first_row, int rows, int head,
                             T* to) {
    constexpr int kChunks = SharedRows<kD>::kChunks;
    for (int i = threadIdx.x; i < kRows * kChunks; i += blockDim.x) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool valid = row < rows && chunk * 8 < view.head_dim;
        const int token = (first_row + row) / view.group;
        const int query_head = head * view.group + (first_row + row) % view.group;
        const T* from = view.q + token * view.q_token_stride + query_head * view.q_head_stride;
        copy_async(to + SharedRows<kD>::at(row, chunk), valid ? from + chunk * 8 : view.q, valid);
    }
}

// Waits for the oldest of `stages - 1` groups of copies (of one, if there is one stage).
__device__ inline void wait_for_stage(int stages) {
    if (stages <= 2) {
        wait_copies<0>();
    } else if (stages == 3) {
        wait_copies<1>();
    } else if (stages == 4) {
        wait_copies<2>();
    } else {
        wait_copies<3>();
    }
}

// The left operand of a matrix instruction out of shared memory: rows first_row.., 16 columns.
template <int kD, typename T>
__device__ void load_left(uint32_t (&a)[4], const T* tile, int first_row, int step) {
    const int lane = threadIdx.x % kWarp, matrix = lane / 8;
    const int row = first_row + lane % 8 + (matrix & 1) * 8;
    load_matrices(a, tile + SharedRows<kD>::at(row, 2 * step + (matrix >> 1)));
}

// Adds to the scores of keys first_key.. + 15 what channels 16 step.. bring.
template <int kD, typename T>
__device__ void add_scores(float (&low)[4], float (&high)[4], const uint32_t (&q)[4], const T* keys,
                           int first_key, int step) {
    const int lane = threadIdx.x % kWarp, matrix = lane / 8;
    const int key = first_key + lane % 8 + (matrix >> 1) * 8;
    uint32_t b[4];
    load_matrices(b, keys + SharedRows<kD>::at(key, 2 * step + (matrix & 1)));
    mma_16x8x16<T>(low, q, {b[0], b[1]});
    mma_16x8x16<T>(high, q, {b[2], b[3]});
}

// Adds weights [16 x 64] times the values of 8 channels.
template <int kD, typename T>
__device__ void add_values(float (&o)[4], const uint32_t (&weights)[4][4], const T* values,
                           int chunk) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t b[4];
        load_matrices_transposed(b, values + SharedRows<kD>::at(half * 32 + lane, chunk));
        mma_16x8x16<T>(o, weights[2 * half], {b[0], b[1]});
        mma_16x8x16<T>(o, weights[2 * half + 1], {b[2], b[3]});
    }
}

// Adds the sums of the weights, as they were rounded.
template <typename T>
__device__ void add_weights(float (&sum)[4], const uint32_t (&weights)[4][4]) {
    const uint32_t one = FormatOf<T>::value == DType::kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
    for (int step = 0; step < 4; ++step) mma_16x8x16<T>(sum, weights[step], {one, one});
}

// q . k as an exponent of 2.
template <typename T>
__device__ float exponent(const AttentionView<T>& view, float score) {
    const float scaled = multiply(score, view.score_factor);
    return view.cap_factor == 0.0f ? scaled : multiply(tanhf(scaled), view.cap_factor);
}

// Largest scores start at -infinity, which must not be subtracted from itself.
__device__ inline float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// What two parts' weights, relative to their own largest scores, are multiplied with.
struct MergeFactors {
    float largest, total, part;

    __device__ MergeFactors(float total_largest, float part_largest)
        : largest(fmaxf(total_largest, part_largest)),
          total(exp2_fast(subtract(total_largest, finite(largest)))),
          part(exp2_fast(subtract(part_largest, finite(largest)))) {}
    __device__ float operator()(float of_total, float of_part) const {
        return fmaf(of_part, part, multiply(of_total, total));
    }
};

__device__ inline float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// What the rows g and g + 8 of a warp's 16 see, and where their results go.
template <typename T>
struct RowPair {
    int first_row, rows;  // of the warp's 16; those beyond `rows` are padding
    int low[2], high[2];  // positions that they see: low <= p < high

    __device__ RowPair(const AttentionView<T>& view, const AttentionUnit& unit, int warp_row)
        : first_row(unit.first_row + warp_row), rows(unit.rows - warp_row) {
        const bool one_token =
            unit.first_row / view.group == (unit.first_row + unit.rows - 1) / view.group;
        const int lane_row = threadIdx.x % kWarp / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = lane_row + 8 * i;
            low[i] = unit.begin;
            high[i] = unit.end;
            if (row >= rows) high[i] = low[i] = 0;
            if (one_token || row >= rows) continue;
            const int token = (first_row + row) / view.group;
            high[i] = view.kv_end[token];
            if (view.window) {
                const int position =
                    token + view.kv_lens[unit.request] - view.query_start[unit.request + 1];
                low[i] = position - view.window + 1;
            }
        }
    }

    __device__ bool sees(int i, int position) const {
        return position >= low[i] && position < high[i];
    }

    // Two channels of row g + 8 i.
    __device__ void write(const AttentionView<T>& view, int i, int head, int channel, float first,
                          float second) const {
        const int row = threadIdx.x % kWarp / 4 + 8 * i;
        if (row >= rows || channel >= view.head_dim) return;
        const int token = (first_row + row) / view.group;
        const int query_head = head * view.group + (first_row + row) % view.group;
        T* out = view.out + token * view.out_token_stride + query_head * view.out_head_stride;
        *reinterpret_cast<uint32_t*>(out + channel) = pack_pair<T>(first, second);
    }
};

// The record of row `row` (of the batch) for part `part`.
template <int kD, typename T>
__device__ float* record_of(const AttentionView<T>& view, int row, int head, int part) {
    const int64_t token = row / view.group, query_head = head * view.group + row % view.group;
    const int64_t index =
        part * view.record_rows + token * (view.group * view.kv_heads) + query_head;
    return view.records + index * record_floats(kD);
}

// Merges the records of some rows in order.
template <typename T, int kD>
__device__ void combine(const AttentionView<T>& view, int first_row, int rows, int parts,
                        int head) {
    constexpr int kVectors = kD / 4;
    const int64_t part_stride = view.record_rows * record_floats(kD);
    for (int i = threadIdx.x; i < rows * kVectors; i += blockDim.x) {
        const int row = first_row + i / kVectors, channel = i % kVectors * 4;
        if (channel >= view.head_dim) continue;
        const float* record = record_of<kD>(view, row, head, 0);
        float4 total = load_written_by_others(record + channel);
        float4 state = load_written_by_others(record + kD);  // largest score, sum of weights
#pragma unroll 4
        for (int part = 1; part < parts; ++part) {
            record += part_stride;
            const float4 more = load_written_by_others(record + channel);
            const float4 other = load_written_by_others(record + kD);
            const MergeFactors merge(state.x, other.x);
            total.x = merge(total.x, more.x);
            total.y = merge(total.y, more.y);
            total.z = merge(total.z, more.z);
            total.w = merge(total.w, more.w);
            state.x = merge.largest;
            state.y = merge(state.y, other.y);
        }
        const float factor = inverse(state.y);
        T* out = view.out + row / view.group * view.out_token_stride +
                 (head * view.group + row % view.group) * view.out_head_stride;
        const uint2 packed{pack_pair<T>(multiply(total.x, factor), multiply(total.y, factor)),
                           pack_pair<T>(multiply(total.z, factor), multiply(total.w, factor))};
        *reinterpret_cast<uint2*>(out + channel) = packed;
    }
}

// For a block that has written so many records of a unit: merges those tiles of which it is the
// last to finish.
template <typename T, int kD>
__device__ void finish_records(const AttentionView<T>& view, const AttentionUnit& unit, int head,
                               int records) {
    __shared__ int complete[kDecodeRows];  // the tile's parts, or 0
    const bool shared = unit.parts < 0;
    const int tiles = shared ? -unit.parts : 1;
    __threadfence();
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < tiles) {
        const int tile = unit.tile + static_cast<int>(threadIdx.x);
        const int parts = shared ? view.parts[tile] : unit.parts;
        int32_t* counter = view.counters + static_cast<int64_t>(tile) * view.kv_heads + head;
        const bool last = atomicAdd(counter, records) + records == parts;
        if (last) *counter = 0;  // for the next layer
        complete[threadIdx.x] = last ? parts : 0;
    }
    __syncthreads();
    __threadfence();
    const int rows = unit.rows / tiles;
    for (int i = 0; i < tiles; ++i) {
        if (complete[i]) combine<T, kD>(view, unit.first_row + i * rows, rows, complete[i], head);
    }
}

}  // namespace sglite::cuda
