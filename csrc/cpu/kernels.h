// What a CPU kernel takes, and the table through which it is called. Every kernel file is compiled
// once for each instruction set ("path") into a namespace of its own; the table of the best path
// that this processor has is picked at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_args.h"

namespace sglite {

// Throws. Not inline: what it needs of the standard library must not be compiled for one path and
// then linked into another.
[[noreturn]] void refuse_float_type(DType dtype);

// Calls `body` with a value of the C++ type that `dtype` stands for.
template <typename Body>
void visit_float_type(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kBFloat16:
            return body(BFloat16{});
        case DType::kFloat16:
            return body(Float16{});
        default:
            refuse_float_type(dtype);
    }
}

}  // namespace sglite

namespace sglite::cpu {

struct AttentionArgs;  // attention.h

// Sampling looks at the vocabulary in blocks of this many logits.
constexpr int64_t kSamplingBlock = 256;

// Arrays that are written a vector at a time have so many places more.
constexpr int64_t kSamplingPadding = 16;

// What one thread needs while it works on a row of `vocab` logits, in bytes: a 64-bit key, a
// candidate's logit and id and an edited logit for each token, two numbers for each block.
constexpr int64_t sampling_workspace_bytes(int64_t vocab) {
    const int64_t blocks = (vocab + kSamplingBlock - 1) / kSamplingBlock;
    return (20 * vocab + 8 * kSamplingPadding + 8 * blocks + 63) / 64 * 64;
}

struct Kernels {
    const char* path;  // "amx", "avx512", "avx2" or "portable"
    void (*rms_norm)(const RmsNormArgs&);
    void (*layer_norm)(const LayerNormArgs&);
    void (*pack_rows)(const PackRowsArgs&);
    void (*unpack_rows)(const PackRowsArgs&);
    int64_t (*linear_workspace)(int64_t m, int64_t k, DType dtype);
    void (*linear)(const LinearArgs&);
    void (*pack_codes)(const PackCodesArgs&);
    void (*quantize_rows)(const QuantizeRowsArgs&);
    void (*read_quantized_rows)(const QuantizedRowsArgs&);
    int64_t (*linear_quantized_workspace)(int64_t m, int64_t k, int64_t groups, DType dtype);
    void (*linear_quantized)(const QuantizedLinearArgs&);
    void (*embedding)(const EmbeddingArgs&);
    void (*apply_rope)(const RopeArgs&);
    void (*rope_and_write_kv)(const RopeAndWriteKvArgs&);
    void (*gated_activation)(const GatedActivationArgs&);
    void (*write_kv)(const WriteKvArgs&);
    void (*copy_kv_slots)(const CopyKvSlotsArgs&);
    void (*paged_attention)(const AttentionArgs&);
    void (*sample)(const SampleArgs&);
    void (*log_probs)(const LogProbsArgs&);
    void (*route)(const RouteArgs&);
    void (*add_rows)(const AddRowsArgs&);
    void (*round_values)(const RoundValuesArgs&);
};

const Kernels& kernels();

// The paths that this binary holds and this processor runs, best first.
std::vector<std::string> available_paths();

// Chooses the path by name from now on; the default is the best one, or SGLITE_CPU_PATH.
void select_path(const std::string& name);

// How many threads kernels started by the calling thread use. 0 sets the default: one for each
// processor this process may run on, at most as many as OpenMP would take.
void set_num_threads(int count);
int num_threads();

// Refuses tensors of other devices, naming the op.
void require_cpu(const char* op, const Tensor& tensor);

}  // namespace sglite::cpu
