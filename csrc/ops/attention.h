// Attention of a ragged batch over a paged cache: the arguments checked, and the work cut into
// units. An object is made for one call; the caller provides the workspace that it asks for.
#pragma once

#include <optional>

#include "cpu/attention.h"
#include "tensor.h"

namespace sglite::ops {

// T tokens of B requests, over caches of P pages.
struct AttentionInputs {
    const Tensor& out;          // [T, q_heads, head_dim]
    const Tensor& q;            // [T, q_heads, head_dim]
    const Tensor& k_cache;      // [P, page_size, kv_heads, head_dim]
    const Tensor& v_cache;      // [P, page_size, kv_heads, head_dim]
    const Tensor& page_table;   // [B, table_width] int32
    const Tensor& query_start;  // [B + 1] int32
    const Tensor& kv_lens;      // [B] int32
    const Tensor& kv_end;       // [T] int32
    double scale;
    std::optional<int64_t> window;
    std::optional<double> soft_cap;
    const Tensor* sinks = nullptr;  // [q_heads] float32, or none
};

struct AttentionSizes {
    int64_t requests, tokens, table_width, page_size, q_heads, kv_heads, head_dim;
    std::optional<int64_t> window;
    int64_t max_query_tokens;  // no request has more
    bool batch_invariant;      // on a GPU: one arithmetic for every number of rows
};

// Checks all that can be known without reading the tensors.
AttentionSizes check_attention(const AttentionInputs& in);

// On the CPU.
class PagedAttention {
  public:
    using Inputs = AttentionInputs;
    // team_held: run() will be called by a thread that holds a team.
    explicit PagedAttention(const Inputs& inputs, bool team_held = false);

    int64_t workspace_size() const { return workspace_size_; }  // in bytes
    double cost() const { return cost_; }                       // in floating-point operations

    // Workspace: at least workspace_size() bytes as uint8, aligned to 64.
    void run(const Tensor& workspace);

  private:
    // Tokens that share the reading of keys: some of a request, or one of each of several requests.
    struct QueryBlock;
    struct Sharing {
        int64_t members = 1, splits = 0;
    };
    Sharing find_sharing(int64_t b) const;
    template <typename Body>
    void for_each_query_block(const Body& body) const;
    template <typename OnUnit, typename OnMerge>
    int64_t cut(const OnUnit& on_unit, const OnMerge& on_merge) const;  // gives the record count

    void check_requests() const;

    cpu::AttentionArgs args_{};
    double cost_ = 0;
    double unit_cost_ = 0;  // what a unit should not exceed
    int64_t unit_rows_ = cpu::kAttentionUnitRows;
    int64_t record_count_ = 0, workspace_size_ = 0;
};

}  // namespace sglite::ops
