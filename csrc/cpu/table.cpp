// The kernel table of one path; compiled once for each, like the kernels themselves.
#include "cpu/kernels.h"
#include "cpu/path.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

void rms_norm(const RmsNormArgs& args);
void layer_norm(const LayerNormArgs& args);
void pack_rows(const PackRowsArgs& args);
void unpack_rows(const PackRowsArgs& args);
int64_t linear_workspace(int64_t m, int64_t k, DType dtype);
void linear(const LinearArgs& args);
void pack_codes(const PackCodesArgs& args);
void quantize_rows(const QuantizeRowsArgs& args);
void read_quantized_rows(const QuantizedRowsArgs& args);
int64_t linear_quantized_workspace(int64_t m, int64_t k, int64_t groups, DType dtype);
void linear_quantized(const QuantizedLinearArgs& args);
void embedding(const EmbeddingArgs& args);
void apply_rope(const RopeArgs& args);
void rope_and_write_kv(const RopeAndWriteKvArgs& args);
void gated_activation(const GatedActivationArgs& args);
void write_kv(const WriteKvArgs& args);
void copy_kv_slots(const CopyKvSlotsArgs& args);
void paged_attention(const AttentionArgs& args);
void sample(const SampleArgs& args);
void log_probs(const LogProbsArgs& args);
void route(const RouteArgs& args);
void add_rows(const AddRowsArgs& args);
void round_values(const RoundValuesArgs& args);

extern const Kernels table;
const Kernels table = {
    .path = SGLITE_CPU_PATH_NAME,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .pack_rows = pack_rows,
    .unpack_rows = unpack_rows,
    .linear_workspace = linear_workspace,
    .linear = linear,
    .pack_codes = pack_codes,
    .quantize_rows = quantize_rows,
    .read_quantized_rows = read_quantized_rows,
    .linear_quantized_workspace = linear_quantized_workspace,
    .linear_quantized = linear_quantized,
    .embedding = embedding,
    .apply_rope = apply_rope,
    .rope_and_write_kv = rope_and_write_kv,
    .gated_activation = gated_activation,
    .write_kv = write_kv,
    .copy_kv_slots = copy_kv_slots,
    .paged_attention = paged_attention,
    .sample = sample,
    .log_probs = log_probs,
    .route = route,
    .add_rows = add_rows,
    .round_values = round_values,
};

}  // namespace sglite::cpu::SGLITE_CPU_PATH
