// What the plan of paged attention (ops/attention.cpp) and its kernels (cpu/attention.cpp) share.
//
// Keys and values are cut at absolute positions: into splits, and a split into blocks. A row's part
// of a split is an online softmax over its blocks; parts are merged in ascending order. Both cuts
// depend on positions alone, so a row's arithmetic is the same in any batch, chunk and query block.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace sglite::cpu {

constexpr int64_t kAttentionBlock = 64;      // keys taken at once
constexpr int64_t kAttentionSplit = 512;     // keys whose part may be computed by a unit of its own
constexpr int64_t kAttentionUnitRows = 192;  // (token, query head) pairs of a unit, if heads allow

// A piece of work for one thread: some tokens of a request, some KV heads, some splits. Where
// requests that decode share pages, their tokens are taken together for the splits that lie there.
struct AttentionUnit {
    int64_t partials;  // index of the first record it writes, or -1: it covers all splits and
                       // writes the output itself
    int32_t request, first_token, tokens;  // rows of q
    int32_t first_head, heads;             // KV heads
    int32_t first_split, splits;
};

// Tokens whose splits are spread over several units, to be merged when all are done.
struct AttentionMerge {
    int64_t partials;  // index of the first of its records, [splits][kv_heads][tokens * group]
    int32_t first_token, tokens, splits;
    // Splits before these, taken together with other requests' tokens: the index of the first
    // record of [shared_splits][kv_heads][shared_rows], and which of the rows is the first here.
    int64_t shared;
    int32_t shared_splits, shared_rows, shared_row;
};

struct AttentionArgs {
    struct Heads {
        void* data;  // [tokens, heads, head_dim]
        int64_t token_stride, head_stride;
    };
    Heads out, q;
    const void* k_cache;  // [pages, page_size, kv_heads, head_dim]
    const void* v_cache;
    const int32_t* page_table;   // [requests, table_width]
    const int32_t* query_start;  // [requests + 1]
    const int32_t* kv_lens;      // [requests]
    const int32_t* kv_end;       // [tokens]
    int64_t requests, tokens, table_width, pages, page_size, q_heads, kv_heads, head_dim;
    int64_t window;  // 0: none
    double scale;
    double soft_cap;     // 0: none
    const float* sinks;  // [q_heads], or null
    DType dtype;

    // The plan.
    const AttentionUnit* units = nullptr;
    const AttentionMerge* merges = nullptr;
    int64_t unit_count = 0, merge_count = 0;
    float* records = nullptr;  // of the units that write partial results
    float* scratch = nullptr;  // [threads, scratch_size]
    int64_t scratch_size = 0;
    int threads = 1;

    int64_t group() const { return q_heads / kv_heads; }
    // What is added to a query head's scores without a key of its own; null where there is none.
    const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
    // The first position that a token at `position` sees; it ends at kv_end.
    int64_t first_visible(int64_t position) const {
        return window && position >= window ? position - window + 1 : 0;
    }
};

// Head sizes are padded to the longest vector.
constexpr int64_t attention_channels(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// A record is the softmax over some keys, before division: the weighted sum of values, the largest
// score, the sum of weights, and padding.
constexpr int64_t attention_record(int64_t head_dim) { return attention_channels(head_dim) + 16; }

// Room for a number of each row, with whole vectors from any of them on.
constexpr int64_t attention_maxima(int64_t rows) { return rows / 16 * 16 + 32; }

// Floats of scratch for one thread whose units have up to `rows` rows over all their heads: per row
// the query, a record for the total, one for the split, lane sums, and a maximum; and a block of
// keys, of values, and of values as pairs.
constexpr int64_t attention_scratch(int64_t head_dim, int64_t rows) {
    return rows * (attention_channels(head_dim) + 2 * attention_record(head_dim) + 16) +
           attention_maxima(rows) + 5 * kAttentionBlock / 2 * attention_channels(head_dim);
}

}  // namespace sglite::cpu
