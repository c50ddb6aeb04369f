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

}  // namespace sglite::cuda
