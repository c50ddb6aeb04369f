// Attention of many query rows on Hopper; see attention_prefill.cuh.
#pragma once

#include "cuda/kernels.h"

namespace sglite::cuda {

// Some neighbouring tokens of a request, whose rows (one for each token and query head of a KV
// head) a block holds at once.
struct PrefillTile {
    int32_t request, first_token, tokens;  // first_token counts rows of q
};

struct PrefillArgs {
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
    const PrefillTile* tiles;    // [max_tiles], those with the most work first
    const int32_t* tile_count;   // how many there are
    int64_t table_width;
    int32_t max_tiles, page_size, q_heads, kv_heads, head_dim;
    int32_t window;        // 0: none
    float exponent_scale;  // from a score to an exponent of 2
    float cap_scale;       // from a score to the argument of tanh; 0: no cap
    DType dtype;

    // The first position that a token at `position` sees; it ends at kv_end.
#ifdef __CUDACC__
    __device__
#endif
    int32_t first_visible(int32_t position) const {
        return window && position >= window ? position - window + 1 : 0;
    }
};

}  // namespace sglite::cuda
