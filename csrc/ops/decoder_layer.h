// A whole decoder layer on the CPU: the ops that it is made of, one after the other, over scratch
// memory of the caller's.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "ops.h"
#include "ops/attention.h"
#include "tensor.h"

namespace sglite::ops {

struct NormPart {
    Tensor weight;
    double epsilon, weight_offset;
};

// A packed weight [n, k].
struct PackedTensors {
    Tensor storage;
    int64_t n, k;
};

// A weight [n, k] and a bias.
struct LinearPart {
    std::variant<PackedTensors, QuantizedTensors> weight;
    std::optional<Tensor> bias;

    int64_t n() const {
        return std::visit([](const auto& tensors) { return tensors.n; }, weight);
    }
    int64_t k() const {
        return std::visit([](const auto& tensors) { return tensors.k; }, weight);
    }
};

struct AttentionPart {
    std::optional<Tensor> q_norm, k_norm;  // [head_dim]
    double epsilon, weight_offset;         // of both
    bool interleaved;
    double scale;
    std::optional<int64_t> window;
    std::optional<double> soft_cap;
};

struct LayerParts {
    NormPart input_norm;
    LinearPart qkv;
    AttentionPart attention;
    LinearPart output;
    NormPart post_norm;
    LinearPart gate_up;
    std::string activation;  // "silu", "gelu" or "gelu_tanh"
    LinearPart down;
};

// T tokens of B requests; see AttentionInputs and rope_and_write_kv.
struct LayerBatch {
    Tensor positions, slots, page_table, query_start, kv_lens, kv_end;
};

// x + attention(norm(x)), and of that h + mlp(norm(h)); every rounding is where the single ops have
// it. Used once: made, given scratch twice, run.
class DecoderLayer {
  public:
    // out, x: [T, hidden], not the same memory. cos_sin: [positions, rotary_dim] float32. k_cache,
    // v_cache: [pages, page_size, kv_heads, head_dim].
    DecoderLayer(const Tensor& out, const Tensor& x, const LayerBatch& batch,
                 const LayerParts& parts, const Tensor& cos_sin, const Tensor& k_cache,
                 const Tensor& v_cache);

    // What the first scratch must have, in bytes; it is uint8, aligned to 64.
    int64_t activation_size() const { return activation_size_; }
    void use_activations(const Tensor& scratch);
    // What the second one must have, known once the first is there.
    int64_t attention_size() const { return attention_->workspace_size(); }
    double cost() const { return cost_; }  // in floating-point operations
    void run(const Tensor& attention_scratch);

  private:
    // A dense matrix, or heads of one, in scratch.
    struct View {
        int64_t shape[3], strides[3];
        Tensor tensor;
        void set(void* data, const Tensor& like, std::initializer_list<int64_t> sizes);
    };

    void run_parts(const Tensor& attention_scratch);
    void linear(const View& out, const View& x, const LinearPart& part,
                const std::optional<Tensor>& residual);

    const LayerBatch& batch_;
    const LayerParts& parts_;
    const Tensor &cos_sin_, &k_cache_, &v_cache_;
    View out_, x_, normed_, qkv_, queries_, attended_, attended_heads_, middle_, gate_up_, gated_;
    View workspace_;
    std::optional<PagedAttention> attention_;
    int64_t activation_size_ = 0;
    double cost_ = 0;
    int threads_ = 1;  // of the team that is held
};

}  // namespace sglite::ops
