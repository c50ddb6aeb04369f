// What the plan of a batch's attention is made from, and what its parts share.
#pragma once

#include "cuda/attention_launch.cuh"

namespace sglite::cuda {

struct PlanView {
    AttentionShape shape;
    const int32_t* query_start;
    const int32_t* kv_lens;
    const int32_t* kv_end;
    const int32_t* page_table;
    AttentionCounts* counts;
    AttentionUnit* decode_units;
    UnitGroup* unit_groups;
    AttentionUnit* extend_units;
    PrefillTile* prefill_tiles;
    int32_t* common;  // [requests]: whole splits whose pages a request shares with the one before
    SharedPrefix* prefixes;  // [requests]
    int32_t* parts;
    int32_t* counters;
    int counter_count, most_parts, group;
    bool shares;           // whether shared splits are looked for
    int groups;            // of decode's units
    float slots;           // extend's units of all heads that the machine should have at least
    float least_prefills;  // tiles of a batch whose prefills have a kernel of their own
};

enum class Kind { kNothing, kDecode, kExtend, kPrefill };

// A request's queries.
struct Queries {
    int first_token, tokens, first_position;
    Kind kind;

    __device__ Queries(const PlanView& view, int request, bool prefills = false) {
        first_token = view.query_start[request];
        const int end = view.query_start[request + 1];
        tokens = end - first_token;
        first_position = view.kv_lens[request] - tokens;
        const int rows = tokens * view.group;
        kind = rows <= 0                               ? Kind::kNothing
               : rows <= kDecodeRows                   ? Kind::kDecode
               : prefills && rows >= kLeastPrefillRows ? Kind::kPrefill
                                                       : Kind::kExtend;
    }
};

// Positions that the tokens first, ..., last - 1 (numbered over the batch) of a request see.
struct Visible {
    int begin = 0, end = 0;

    __device__ Visible(const PlanView& view, const Queries& queries, int first, int last) {
        for (int token = first; token < last; ++token) end = max(end, view.kv_end[token]);
        end = min(end, static_cast<int>(view.shape.table_width * view.shape.page_size));
        if (view.shape.window) {
            const int position = queries.first_position + first - queries.first_token;
            begin = max(0, position - static_cast<int>(view.shape.window) + 1);
        }
        if (begin >= end) begin = end = 0;
    }
};

}  // namespace sglite::cuda
