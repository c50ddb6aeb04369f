#include "ops/decoder_layers.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "ops/activation.h"
#include "ops/held_team.h"

namespace sglite::ops {

namespace {

constexpr const char* kOp = "decoder_layers";

}  // namespace

DecoderLayer::DecoderLayer(const Tensor& x, const LayerBatch& batch, LayerParts given,
                           const Tensor& cos_sin, const Tensor& k_cache, const Tensor& v_cache)
    : batch_(batch),
      parts_(std::move(given)),
      cos_sin_(cos_sin),
      k_cache_(k_cache),
      v_cache_(v_cache) {
    const LayerParts& parts = parts_;
    const int64_t tokens = x.size(0), hidden = x.size(1);
    Check(kOp, "k_cache", k_cache).ndim(4);
    const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
    const int64_t heads = head_dim ? parts.output.k() / head_dim : 0;
    const int64_t width = heads * head_dim, gated = parts.down.k();
    parts.qkv.check_widths(kOp, "qkv", width + 2 * kv_heads * head_dim, hidden);
    parts.output.check_widths(kOp, "output", hidden, width);
    parts.gate_up.check_widths(kOp, "gate_up", 2 * gated, hidden);
    parts.down.check_widths(kOp, "down", hidden, gated);
    activation_named(kOp, parts.activation);

    out_.set(nullptr, x, {tokens, hidden});
    x_.set(nullptr, x, {tokens, hidden});
    normed_.set(nullptr, x, {tokens, hidden});
    qkv_.set(nullptr, x, {tokens, parts.qkv.n()});
    queries_.set(nullptr, x, {tokens, heads, head_dim});
    queries_.strides[0] = parts.qkv.n();
    attended_.set(nullptr, x, {tokens, width});
    attended_heads_.set(nullptr, x, {tokens, heads, head_dim});
    middle_.set(nullptr, x, {tokens, hidden});
    gate_up_.set(nullptr, x, {parts.gate_up.needs_both() ? tokens : 0, 2 * gated});
    gated_.set(nullptr, x, {tokens, gated});

    int64_t workspace = 0;
    for (const LinearPart* part : {&parts.qkv, &parts.output, &parts.gate_up, &parts.down}) {
        workspace = std::max(workspace, part->workspace_size(kOp, tokens, x.dtype));
        cost_ += part->cost(tokens);
    }
    workspace_.set(nullptr, x, {workspace});
    workspace_.tensor.dtype = DType::kUInt8;
    for (const ScratchTensor* view : {&normed_, &qkv_, &attended_, &middle_, &gate_up_, &gated_}) {
        activation_size_ += view->bytes();
    }
    activation_size_ += workspace;
}

void DecoderLayer::use_activations(char* next, bool team_held) {
    for (ScratchTensor* view : {&normed_, &qkv_, &attended_, &middle_, &gate_up_, &gated_}) {
        view->tensor.data = next;
        next += view->bytes();
    }
    workspace_.tensor.data = next;
    queries_.tensor.data = qkv_.tensor.data;
    attended_heads_.tensor.data = attended_.tensor.data;
    const AttentionPart& part = parts_.attention;
    attention_.emplace(AttentionInputs{attended_heads_.tensor, queries_.tensor, k_cache_, v_cache_,
                                       batch_.page_table, batch_.query_start, batch_.kv_lens,
                                       batch_.kv_end, part.scale, part.window, part.soft_cap},
                       team_held);
    cost_ += attention_->cost();
}

void DecoderLayer::linear(const ScratchTensor& out, const ScratchTensor& x, const LinearPart& part,
                          const std::optional<Tensor>& residual) {
    part.run(out.tensor, x.tensor, residual, workspace_.tensor);
}

void DecoderLayer::run(void* out, void* x, const Tensor& attention_scratch) {
    out_.tensor.data = out;
    x_.tensor.data = x;
    const auto norm = [&](const NormPart& part, const ScratchTensor& x) {
        rms_norm(normed_.tensor, x.tensor, part.weight, part.epsilon, part.weight_offset,
                 std::nullopt);
    };
    norm(parts_.input_norm, x_);
    linear(qkv_, normed_, parts_.qkv, std::nullopt);
    const AttentionPart& part = parts_.attention;
    rope_and_write_kv(qkv_.tensor, batch_.positions, cos_sin_, k_cache_, v_cache_, batch_.slots,
                      part.q_norm, part.k_norm, part.epsilon, part.weight_offset, part.interleaved);
    attention_->run(attention_scratch);
    linear(middle_, attended_, parts_.output, x_.tensor);
    norm(parts_.post_norm, middle_);
    parts_.gate_up.run_gated(gated_.tensor, gate_up_.tensor, normed_.tensor, parts_.activation,
                             workspace_.tensor);
    linear(out_, gated_, parts_.down, middle_.tensor);
}

DecoderLayers::DecoderLayers(const Tensor& out, const Tensor& x, const LayerBatch& batch)
    : out_(out), x_(x), batch_(batch) {
    cpu::require_cpu(kOp, x);
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense();
    const Check check(kOp, "out", out);
    check.dtype(x.dtype).shape({x.size(0), x.size(1)}).dense().same_device(x);
    if (out.data == x.data && x.size(0)) check.fail("other memory than that of x");
}

void DecoderLayers::add(LayerParts parts, const Tensor& cos_sin, const Tensor& k_cache,
                        const Tensor& v_cache) {
    layers_.emplace_back(x_, batch_, std::move(parts), cos_sin, k_cache, v_cache);
}

int64_t DecoderLayers::hidden_size() const { return aligned(x_.numel() * dtype_size(x_.dtype)); }

int64_t DecoderLayers::activation_size() const {
    int64_t size = 0;
    for (const DecoderLayer& layer : layers_) size = std::max(size, layer.activation_size());
    return hidden_size() + size;
}

int64_t DecoderLayers::attention_size() const {
    int64_t size = 0;
    for (const DecoderLayer& layer : layers_) size = std::max(size, layer.attention_size());
    return size;
}

double DecoderLayers::cost() const {
    double cost = 0;
    for (const DecoderLayer& layer : layers_) cost += layer.cost();
    return cost;
}

int DecoderLayers::threads() const {
    const double count = static_cast<double>(std::max<size_t>(layers_.size(), 1));
    return held_threads(cost() / count);
}

void DecoderLayers::use_activations(const Tensor& scratch) {
    check_scratch(kOp, "activations", scratch, activation_size());
    between_ = scratch.data;
    const bool team_held = threads() > 1;
    for (DecoderLayer& layer : layers_) {
        layer.use_activations(scratch.ptr<char>() + hidden_size(), team_held);
    }
}

void DecoderLayers::run(const Tensor& attention_scratch) {
    const auto body = [&] {
        void* x = x_.data;
        // The last layer's is out.
        bool to_out = layers_.size() % 2;
        for (DecoderLayer& layer : layers_) {
            void* out = to_out ? out_.data : between_;
            layer.run(out, x, attention_scratch);
            x = out;
            to_out = !to_out;
        }
    };
    hold_team(threads(), body);
}

}  // namespace sglite::ops
