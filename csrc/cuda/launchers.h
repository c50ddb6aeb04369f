// One launcher for each op, defined in the file of its kernels.
#pragma once

#include "cuda/kernels.h"

namespace sglite::cuda {

void rms_norm(const RmsNormArgs& args, Stream stream);
void linear(const LinearArgs& args, const LinearFusion& fusion, Stream stream);
// Whether `linear` has a kernel for this dtype and alignment.
bool linear_takes(const LinearArgs& args);
void embedding(const EmbeddingArgs& args, Stream stream);
void apply_rope(const RopeArgs& args, Stream stream);
void gated_activation(const GatedActivationArgs& args, Stream stream);
void write_kv(const WriteKvArgs& args, Stream stream);
int64_t sampling_workspace_bytes(int64_t vocab, int64_t rows, int device);
void sample(const SampleArgs& args, Stream stream);
void log_probs(const LogProbsArgs& args, Stream stream);
void gather_tokens(const GatherTokensArgs& args, Stream stream);
void advance(const AdvanceArgs& args, Stream stream);
void copy_kv_slots(const CopyKvSlotsArgs& args, Stream stream);
bool rope_and_write_kv(const RopeAndWriteKvArgs& args, Stream stream);
void plan_attention(const AttentionPlanArgs& args, Stream stream);
void paged_attention(const AttentionArgs& args, Stream stream);
int64_t expert_mix_workspace(const ExpertMixArgs& args);
void mix_experts(const ExpertMixArgs& args, Stream stream);

// The kernels of paged_attention.
void attention_decode(const AttentionArgs& args, Stream stream);
void attention_extend(const AttentionArgs& args, Stream stream);
void attention_plain(const AttentionArgs& args, Stream stream);

}  // namespace sglite::cuda
