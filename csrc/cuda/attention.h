// What paged attention's plan, its kernels and ops/attention_cuda.cpp share.
//
// Keys are cut at absolute positions, into splits and a split into tiles of 64. A row's part of a
// split is an online softmax over its tiles; parts are merged in ascending order. Units of work
// hold any number of splits: those of one that starts with a row's first split are merged at once,
// of any other each becomes a part by itself. So a row's bits depend on positions alone, not on how
// the plan has cut the work, nor on which kernel did it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels.h"
#include "host_device.h"
#include "tensor.h"

namespace sglite::cuda {

constexpr int kAttentionTile = 64;  // keys taken at once

// Splits grow with the position: short contexts need many to fill the machine, and long ones would
// have too many.
constexpr int kShortSplit = 256, kMediumSplit = 512, kLongSplit = 1024;
constexpr int kMediumFrom = 1024, kLongFrom = 8192;
constexpr int kShortSplits = kMediumFrom / kShortSplit;
constexpr int kMediumSplits = (kLongFrom - kMediumFrom) / kMediumSplit;

SGLITE_HOST_DEVICE constexpr int split_of(int position) {
    if (position < kMediumFrom) return position / kShortSplit;
    if (position < kLongFrom) return kShortSplits + (position - kMediumFrom) / kMediumSplit;
    return kShortSplits + kMediumSplits + (position - kLongFrom) / kLongSplit;
}
SGLITE_HOST_DEVICE constexpr int split_begin(int split) {
    if (split < kShortSplits) return split * kShortSplit;
    if (split < kShortSplits + kMediumSplits)
        return kMediumFrom + (split - kShortSplits) * kMediumSplit;
    return kLongFrom + (split - kShortSplits - kMediumSplits) * kLongSplit;
}

// Rows are (token, query head of a KV head's group) pairs, numbered over the whole batch:
// token * group + head. Requests with up to kDecodeRows of them go to the decode kernel.
constexpr int kDecodeRows = 16;
constexpr int kExtendRows = 64;

// Work for one block: some rows, some keys; done once for each KV head. The rows are of one
// request, or of neighbouring ones with one token each, whose pages are the same up to `end`.
struct alignas(16) AttentionUnit {
    int32_t request, first_row, rows;
    int32_t tile;         // of the units that share rows: where they count who has finished
    int32_t begin, end;   // positions, within which at least one row sees each key
    int32_t part, parts;  // the first of the tile's parts that are the unit's; parts -n: the rows
                          // of n requests, for whose tiles tile, ..., tile + n - 1
                          // AttentionLayout::parts counts them
};

// Decode's units are cut such that groups of neighbouring ones have equally many keys. A group is
// done by one block for each KV head.
struct alignas(16) UnitGroup {
    AttentionUnit unit;    // the first of them
    int32_t first, count;  // places among the units
    int32_t unused[2];
};
constexpr int kMostGroups = 1024;

// Head sizes are padded to one that kernels are made for; 0: too large.
SGLITE_HOST_DEVICE constexpr int64_t padded_head_dim(int64_t head_dim) {
    return head_dim <= 64    ? 64
           : head_dim <= 96  ? 96
           : head_dim <= 128 ? 128
           : head_dim <= 256 ? 256
                             : 0;
}
// Rows that a block of the kernel for large prefills holds at once.
SGLITE_HOST_DEVICE constexpr int prefill_rows(int64_t padded_dim) {
    return padded_dim == 64 ? 192 : 128;
}
constexpr int kLeastPrefillRows = 64;  // of a request that goes to that kernel

// Tokens of one request for the kernel that takes large prefills.
struct PrefillTile {
    int32_t request, first_token, tokens;
};

// What the plan counts, at the start of the workspace.
struct AttentionCounts {
    int32_t decode_units, extend_units, prefill_tiles;
    int32_t prefill_tickets;  // drawn by the blocks of that kernel; 0 whenever none runs
    int32_t decode_keys;      // that decode's units hold
};

// A request's place among others that share pages with it.
struct SharedPrefix {
    int32_t leader;   // of neighbouring requests that share a unit
    int32_t members;  // in all
    int32_t splits;   // their first ones, which they share
    int32_t place;    // keys of decode's units before this request's
};

// The sizes that a plan is made for. The workspace's layout depends on nothing else.
struct AttentionShape {
    int64_t requests, tokens, table_width, page_size, q_heads, kv_heads, head_dim;
    int64_t window;            // 0: none
    int64_t max_query_tokens;  // that a request has
    bool prefills;             // whether many tokens of a request may become PrefillTiles

    SGLITE_HOST_DEVICE int64_t group() const { return q_heads / kv_heads; }
    // Tokens of a PrefillTile; 0 where too many query heads share a KV head.
    SGLITE_HOST_DEVICE int64_t prefill_tile() const {
        return prefill_rows(padded_head_dim(head_dim)) / group();
    }
    SGLITE_HOST_DEVICE bool has_extends() const { return max_query_tokens * group() > kDecodeRows; }
};

// Floats of a record: the weighted sum of values, the largest score, the sum of weights, padding.
SGLITE_HOST_DEVICE constexpr int record_floats(int padded_dim) { return padded_dim + 4; }

// Where things lie in the workspace, in bytes; multiples of 128.
struct AttentionLayout {
    int64_t decode_units, unit_groups, extend_units, prefill_tiles;
    int64_t common, prefixes, parts, counters, records, bytes;
    int64_t decode_places, extend_places, counter_count, most_parts, most_prefill_tiles;

    explicit AttentionLayout(const AttentionShape& shape) {
        // Enough parts to fill any machine; beyond that, tiles are cut less.
        constexpr int64_t kRecordRows = 1 << 16;
        const int64_t rows = std::max<int64_t>(shape.tokens * shape.q_heads, 1);
        const int64_t positions = std::max<int64_t>(shape.table_width * shape.page_size, 1);
        const int64_t splits = split_of(static_cast<int>(positions - 1)) + 1;
        most_parts = std::clamp<int64_t>(kRecordRows / rows, 1, splits);
        const int64_t tiles = shape.has_extends() ? shape.tokens * shape.group() / kExtendRows +
                                                        std::min(shape.requests, shape.tokens)
                                                  : 0;
        counter_count = (shape.requests + tiles + shape.requests) * shape.kv_heads;
        bytes = sizeof(AttentionCounts);
        decode_places = std::max<int64_t>(shape.requests * most_parts, 1);
        extend_places = tiles * most_parts;
        decode_units = take(decode_places * sizeof(AttentionUnit));
        unit_groups = take(kMostGroups * sizeof(UnitGroup));
        extend_units = take(extend_places * sizeof(AttentionUnit));
        most_prefill_tiles = shape.has_extends() && shape.prefill_tile()
                                 ? shape.tokens / shape.prefill_tile() + shape.requests
                                 : 0;
        prefill_tiles = take(most_prefill_tiles * sizeof(PrefillTile));
        common = take(shape.requests * sizeof(int32_t));
        prefixes = take(shape.requests * sizeof(SharedPrefix));
        parts = take(shape.requests * sizeof(int32_t));
        counters = take(counter_count * sizeof(int32_t));
        const int width = record_floats(static_cast<int>(padded_head_dim(shape.head_dim)));
        records = take(most_parts > 1 ? most_parts * rows * width * sizeof(float) : 0);
        bytes = take(0);
    }

  private:
    int64_t take(int64_t size) {
        const int64_t start = (bytes + 127) / 128 * 128;
        bytes = start + size;
        return start;
    }
};

struct AttentionPlanArgs {
    AttentionShape shape;
    const int32_t* query_start;  // [requests + 1]
    const int32_t* kv_lens;      // [requests]
    const int32_t* kv_end;       // [tokens]
    const int32_t* page_table;   // [requests, table_width]
    void* workspace;             // AttentionLayout::bytes, 64-byte aligned
};

struct AttentionArgs {
    struct Heads {
        void* data;  // [tokens, heads, head_dim]
        int64_t token_stride, head_stride;
    };
    AttentionShape shape;
    Heads out, q;
    const void* k_cache;  // [pages, page_size, kv_heads, head_dim]
    const void* v_cache;
    const int32_t* page_table;   // [requests, table_width]
    const int32_t* query_start;  // [requests + 1]
    const int32_t* kv_lens;      // [requests]
    const int32_t* kv_end;       // [tokens]
    double scale, soft_cap;      // soft_cap 0: none
    const float* sinks;          // [q_heads], or null
    DType dtype;
    void* workspace;  // as the plan has filled it; null where planned_attention() is false
};

// Whether the arguments suit the kernels that work by a plan; any others run without one.
bool planned_attention(const AttentionArgs& args);

}  // namespace sglite::cuda
