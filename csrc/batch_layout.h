// Where the tokens of a step's requests go: one after the other, with positions, slots and pages.
#pragma once

#include <cstdint>
#include <span>

namespace sglite {

// The positions `start` to `stop` (exclusive) of a request.
struct ScheduledTokens {
    std::span<const int64_t> token_ids;
    std::span<const int32_t> pages;  // that it holds, in order
    int64_t start, stop;
};

// Memory for T tokens of B requests, `table_width` pages at most.
struct BatchLayout {
    int64_t* input_ids;    // [T]
    int64_t* positions;    // [T]
    int64_t* slots;        // [T], page * page_size + offset
    int32_t* query_start;  // [B + 1]
    int32_t* kv_lens;      // [B]
    int32_t* kv_end;       // [T], causal
    int32_t* page_table;   // [B, table_width], zeros behind a request's pages
    int64_t table_width, page_size;
};

// Throws std::invalid_argument for positions beyond a request's tokens or pages, before anything is
// written.
void lay_out(std::span<const ScheduledTokens> requests, const BatchLayout& out);

}  // namespace sglite
