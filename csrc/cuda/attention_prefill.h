// Attention of many query rows on Hopper's warpgroup matrix unit; see attention_prefill.cuh.
#pragma once

#include "cuda/attention.h"
#include "cuda/tensor_map.cuh"

namespace sglite::cuda {

// Whether attention_prefill takes batches of this shape on this GPU. Asks what was compiled for it,
// and touches no stream.
bool takes_prefills(const AttentionShape& shape, int device);

// The tiles that the plan has made, for shapes that it takes.
void attention_prefill(const AttentionArgs& args, Stream stream);

// ---- between the files of the kernel ------------------------------------------------------------

// Neighbouring keys that must lie in one page.
constexpr int kPrefillSpan = 16;

struct PrefillArgs {
    TensorMap key_map, value_map;  // of the caches, in tiles of kPrefillSpan rows; if has_maps
    bool has_maps;
    AttentionArgs::Heads out, q;
    const void* k_cache;  // [pages, page_size, kv_heads, head_dim]
    const void* v_cache;
    const int32_t* page_table;   // [requests, table_width]
    const int32_t* query_start;  // [requests + 1]
    const int32_t* kv_lens;      // [requests]
    const int32_t* kv_end;       // [tokens]
    const PrefillTile* tiles;    // [max_tiles]
    const int32_t* tile_count;   // how many there are
    int32_t* tickets;            // 0 before and after the kernel
    int64_t table_width;
    int32_t max_tiles, page_size, group, kv_heads, head_dim, multiprocessors;
    int32_t group_inverse;  // 65536 / group + 1
    int32_t window;         // 0: none
    float score_scale;      // applied first, if `scaled`
    float exponent_scale;   // from a score, or its tanh if `capped`, to an exponent of 2; positive
    bool scaled, capped;
    DType dtype;

    // The token, within its tile, that a row belongs to: row / group for up to 256 rows.
    SGLITE_HOST_DEVICE int32_t token_of(int32_t row) const { return row * group_inverse >> 16; }
    // The first position that a token at `position` sees; it ends at kv_end.
    SGLITE_HOST_DEVICE int32_t first_visible(int32_t position) const {
        return window && position >= window ? position - window + 1 : 0;
    }
};

// Each head size has a file of its own.
template <int kDim>
void launch_prefill(const PrefillArgs& args, Stream stream);
template <int kDim>
bool prefill_is_built(int device);

}  // namespace sglite::cuda
