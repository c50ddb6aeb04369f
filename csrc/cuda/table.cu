#include "cuda/kernels.h"
#include "cuda/launchers.h"

namespace sglite::cuda {

const Kernels table = {
    .rms_norm = rms_norm,
    .embedding = embedding,
    .apply_rope = apply_rope,
    .gated_activation = gated_activation,
    .write_kv = write_kv,
    .copy_kv_slots = copy_kv_slots,
    .rope_and_write_kv = rope_and_write_kv,
};

}  // namespace sglite::cuda
