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
};

}  // namespace sglite::cuda
