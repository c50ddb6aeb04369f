#include "cuda/attention_prefill.h"
#include "cuda/kernels.h"
#include "cuda/launchers.h"

namespace sglite::cuda {

const Kernels table = {
    .rms_norm = rms_norm,
    .embedding = embedding,
    .apply_rope = apply_rope,
    .gated_activation = gated_activation,
    .write_kv = write_kv,
    .plan_attention = plan_attention,
    .planned_attention = planned_attention,
    .takes_prefills = takes_prefills,
    .paged_attention = paged_attention,
};

}  // namespace sglite::cuda
