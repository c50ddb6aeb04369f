// One launcher for each op, defined in the file of its kernels.
#pragma once

#include "cuda/kernels.h"

namespace sglite::cuda {

void rms_norm(const RmsNormArgs& args, Stream stream);
void embedding(const EmbeddingArgs& args, Stream stream);
void apply_rope(const RopeArgs& args, Stream stream);
void gated_activation(const GatedActivationArgs& args, Stream stream);
void write_kv(const WriteKvArgs& args, Stream stream);
void plan_attention(const AttentionPlanArgs& args, Stream stream);
void paged_attention(const AttentionArgs& args, Stream stream);

// The kernels of paged_attention.
void attention_decode(const AttentionArgs& args, Stream stream);
void attention_extend(const AttentionArgs& args, Stream stream);
void attention_plain(const AttentionArgs& args, Stream stream);

}  // namespace sglite::cuda
