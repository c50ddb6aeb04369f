// The table through which the CUDA kernels are called: each enqueues its work on a stream and
// returns. Empty in a build without CUDA.
#pragma once

#include "kernel_args.h"

namespace sglite::cuda {

// Where work is enqueued.
struct Stream {
    void* handle;  // a cudaStream_t
    int device;
};

struct AttentionArgs;  // attention.h
struct AttentionPlanArgs;
struct AttentionShape;

struct Kernels {
    void (*rms_norm)(const RmsNormArgs&, Stream);
    void (*linear)(const LinearArgs&, const LinearFusion&, Stream);
    bool (*linear_takes)(const LinearArgs&);
    void (*embedding)(const EmbeddingArgs&, Stream);
    void (*apply_rope)(const RopeArgs&, Stream);
    void (*gated_activation)(const GatedActivationArgs&, Stream);
    void (*write_kv)(const WriteKvArgs&, Stream);
    int64_t (*sampling_workspace_bytes)(int64_t vocab, int64_t rows, int device);
    void (*sample)(const SampleArgs&, Stream);
    void (*log_probs)(const LogProbsArgs&, Stream);
    void (*gather_tokens)(const GatherTokensArgs&, Stream);
    void (*advance)(const AdvanceArgs&, Stream);
    void (*copy_kv_slots)(const CopyKvSlotsArgs&, Stream);
    // False, and nothing done, where heads do not fit the kernel: then its parts run one by one.
    bool (*rope_and_write_kv)(const RopeAndWriteKvArgs&, Stream);
    void (*plan_attention)(const AttentionPlanArgs&, Stream);
    bool (*planned_attention)(const AttentionArgs&);
    bool (*takes_prefills)(const AttentionShape&, int device);
    void (*paged_attention)(const AttentionArgs&, Stream);
    int64_t (*expert_mix_workspace)(const ExpertMixArgs&);
    void (*mix_experts)(const ExpertMixArgs&, Stream);
};

// The kernels; throws, naming the op and how to build them, where there are none.
const Kernels& kernels(const char* op);

// torch's current stream on the tensor's device.
Stream stream_of(const Tensor& tensor);

// Called once, when the module is loaded.
using StreamSource = void* (*)(int device);
void install(const Kernels* kernels, StreamSource stream_source);

// In table.cu.
extern const Kernels table;

}  // namespace sglite::cuda
