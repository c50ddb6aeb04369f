// Whole decoder layers on the CPU: the ops that they are made of, one after the other, over scratch
// memory of the caller's.
#pragma once

#include <deque>
#include <optional>
#include <string>

#include "ops.h"
#include "ops/attention.h"
#include "ops/linear_part.h"
#include "ops/scratch.h"
#include "tensor.h"

namespace sglite::ops {

struct NormPart {
    Tensor weight;
    double epsilon, weight_offset;
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
// it.
class DecoderLayer {
  public:
    // rows: [R] int64, ascending: the layer gives these rows of x; none: all of them.
    DecoderLayer(const Tensor& x, const LayerBatch& batch, LayerParts parts, const Tensor& cos_sin,
                 const Tensor& k_cache, const Tensor& v_cache, const Tensor* rows);

    // Of the memory that use_activations() takes, in bytes.
    int64_t activation_size() const { return activation_size_; }
    // scratch: aligned to 64. team_held: run() will be called while a team is held.
    void use_activations(char* scratch, bool team_held);
    // What of scratch run() takes, known once there are activations.
    int64_t attention_size() const { return attention_->workspace_size(); }
    double cost() const { return cost_; }  // in floating-point operations
    // out: the memory of x, or other memory; of R rows, where there are rows.
    void run(void* out, void* x, const Tensor& attention_scratch);

  private:
    void linear(const ScratchTensor& out, const ScratchTensor& x, const LinearPart& part,
                const std::optional<Tensor>& residual);

    const LayerBatch& batch_;
    const LayerParts parts_;
    const Tensor &cos_sin_, &k_cache_, &v_cache_;
    const Tensor* const rows_;
    ScratchTensor x_, normed_, qkv_, queries_, attended_, attended_heads_;  // of all rows
    // Of those that the layer gives; the first three lie where x (or out), attended and normed do.
    ScratchTensor residual_, taken_, post_normed_, middle_, gate_up_, gated_, out_;
    ScratchTensor workspace_;
    std::optional<PagedAttention> attention_;
    int64_t activation_size_ = 0;
    double cost_ = 0;
};

// Layers one behind the other. Used once: made, given layers, given scratch twice, run.
class DecoderLayers {
  public:
    // out: [R, hidden], x: [T, hidden], not the same memory. rows: [R] int64, ascending: those of x
    // that the last layer gives; without them it gives all, and R is T.
    DecoderLayers(const Tensor& out, const Tensor& x, const LayerBatch& batch,
                  const std::optional<Tensor>& rows);

    // cos_sin: [positions, rotary_dim] float32. k_cache, v_cache: [pages, page_size, kv_heads,
    // head_dim]. The three must stay where they are. is_last: no further one comes.
    void add(LayerParts parts, const Tensor& cos_sin, const Tensor& k_cache, const Tensor& v_cache,
             bool is_last);

    // What the first scratch must have, in bytes; it is uint8, aligned to 64.
    int64_t activation_size() const;
    void use_activations(const Tensor& scratch);
    // What the second one must have, known once the first is there.
    int64_t attention_size() const;
    double cost() const;  // in floating-point operations
    void run(const Tensor& attention_scratch);

  private:
    int64_t hidden_size() const;  // of hidden states, in bytes
    int threads() const;          // of the team that is held

    const Tensor &out_, &x_;
    const LayerBatch& batch_;
    const Tensor* rows_ = nullptr;  // where they are not all
    std::deque<DecoderLayer> layers_;
    void* between_ = nullptr;  // hidden states between layers
};

}  // namespace sglite::ops
