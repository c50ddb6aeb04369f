// Paged attention on a GPU, which works by a plan that is made once for all layers of a step.
#pragma once

#include "ops/attention.h"

namespace sglite::ops {

// Bytes of the workspace that a plan and its attention calls share.
int64_t attention_workspace(const AttentionSizes& sizes);

// Fills the plan's part of the workspace (uint8, aligned to 64 bytes) on the device.
void plan_attention(const Tensor& workspace, const Tensor& page_table, const Tensor& query_start,
                    const Tensor& kv_lens, const Tensor& kv_end, const AttentionSizes& sizes);

// For `in.q` on a GPU. `workspace` holds a plan for the same lengths, sizes and window.
void paged_attention_cuda(const AttentionInputs& in, const Tensor& workspace,
                          int64_t max_query_tokens, bool same_arithmetic);

}  // namespace sglite::ops
