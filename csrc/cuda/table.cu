#include "cuda/attention_prefill.h"
#include "cuda/kernels.h"
#include "cuda/launchers.h"

namespace sglite::cuda {

const Kernels table = {
    .rms_norm = rms_norm,
    .linear = linear,
    .linear_takes = linear_takes,
    .embedding = embedding,
    .apply_rope = apply_rope,
    .gated_activation = gated_activation,
    .write_kv = write_kv,
    .sampling_workspace_bytes = sampling_workspace_bytes,
    .sample = sample,
    .log_probs = log_probs,
    .gather_tokens = gather_tokens,
    .advance = advance,
    .copy_kv_slots = copy_kv_slots,
    .rope_and_write_kv = rope_and_write_kv,
    .plan_attention = plan_attention,
    .planned_attention = planned_attention,
    .takes_prefills = takes_prefills,
    .paged_attention = paged_attention,
    .expert_mix_workspace = expert_mix_workspace,
    .mix_experts = mix_experts,
};

}  // namespace sglite::cuda
