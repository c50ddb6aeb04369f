// One launcher for each op, defined in the file of its kernels.
#pragma once

#include "cuda/kernels.h"

namespace sglite::cuda {

void rms_norm(const RmsNormArgs& args, Stream stream);
void embedding(const EmbeddingArgs& args, Stream stream);
void apply_rope(const RopeArgs& args, Stream stream);
void gated_activation(const GatedActivationArgs& args, Stream stream);
void write_kv(const WriteKvArgs& args, Stream stream);
void gather_tokens(const GatherTokensArgs& args, Stream stream);
void advance(const AdvanceArgs& args, Stream stream);

}  // namespace sglite::cuda
