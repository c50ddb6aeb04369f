#include "ops/decoder_layers.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "ops/activation.h"
#include "ops/held_team.h"

namespace sglite::ops {

namespace {

constexpr const char* kOp = "decoder_layers";

void check_rows(const Tensor& rows, const Tensor& x) {
    Check(kOp, "rows", rows).dtype(DType::kInt64).ndim(1).dense().same_device(x);
    const auto* row = rows.ptr<const int64_t>();
    for (int64_t i = 0; i < rows.size(0); ++i) {
        if (row[i] >= (i ? row[i - 1] + 1 : 0) && row[i] < x.size(0)) continue;
        throw std::invalid_argument(std::string(kOp) + ": rows[" + std::to_string(i) + "] is " +
                                    std::to_string(row[i]) + ", but they must ascend among the " +
                                    std::to_string(x.size(0)) + " rows of x");
    }
}

// to may be from: no row moves back.
void take(const ScratchTensor& to, const ScratchTensor& from, const Tensor& rows) {
    const auto* row = rows.ptr<const int64_t>();
    const auto size = static_cast<size_t>(from.shape[1] * dtype_size(from.tensor.dtype));
    for (int64_t i = 0; i < rows.size(0); ++i) {
        std::memmove(to.tensor.ptr<char>() + static_cast<size_t>(i) * size,
                     from.tensor.ptr<char>() + static_cast<size_t>(row[i]) * size, size);
    }
}

}  // namespace

DecoderLayer::DecoderLayer(const Tensor& x, const LayerBatch& batch, LayerParts given,
                           const Tensor& cos_sin, const Tensor& k_cache, const Tensor& v_cache,
                           const Tensor* rows)
    : batch_(batch),
      parts_(std::move(given)),
      cos_sin_(cos_sin),
      k_cache_(k_cache),
      v_cache_(v_cache),
      rows_(rows) {
    const LayerParts& parts = parts_;
    const int64_t tokens = x.size(0), hidden = x.size(1);
    const int64_t kept = rows ? rows->size(0) : tokens;
    Check(kOp, "k_cache", k_cache).ndim(4);
    const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
    const int64_t heads = head_dim ? parts.output.k() / head_dim : 0;
    const int64_t width = heads * head_dim, gated = parts.down.k();
    parts.qkv.check_widths(kOp, "qkv", width + 2 * kv_heads * head_dim, hidden);
    parts.output.check_widths(kOp, "output", hidden, width);
    parts.gate_up.check_widths(kOp, "gate_up", 2 * gated, hidden);
    parts.down.check_widths(kOp, "down", hidden, gated);
    activation_named(kOp, parts.activation);

    x_.set(nullptr, x, {tokens, hidden});
    normed_.set(nullptr, x, {tokens, hidden});
    qkv_.set(nullptr, x, {tokens, parts.qkv.n()});
    queries_.set(nullptr, x, {tokens, heads, head_dim});
    queries_.strides[0] = parts.qkv.n();
    attended_.set(nullptr, x, {tokens, width});
    attended_heads_.set(nullptr, x, {tokens, heads, head_dim});
    residual_.set(nullptr, x, {kept, hidden});
    taken_.set(nullptr, x, {kept, width});
    post_normed_.set(nullptr, x, {kept, hidden});
    middle_.set(nullptr, x, {kept, hidden});
    gate_up_.set(nullptr, x, {parts.gate_up.needs_both() ? kept : 0, 2 * gated});
    gated_.set(nullptr, x, {kept, gated});
    out_.set(nullptr, x, {kept, hidden});

    int64_t workspace = parts.qkv.workspace_size(kOp, tokens, x.dtype);
    cost_ += parts.qkv.cost(tokens);
    for (const LinearPart* part : {&parts.output, &parts.gate_up, &parts.down}) {
        workspace = std::max(workspace, part->workspace_size(kOp, kept, x.dtype));
        cost_ += part->cost(kept);
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
    attended_heads_.tensor.data = taken_.tensor.data = attended_.tensor.data;
    post_normed_.tensor.data = normed_.tensor.data;
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
    residual_.tensor.data = rows_ ? out : x;
    const auto norm = [](const ScratchTensor& out, const ScratchTensor& x, const NormPart& part) {
        rms_norm(out.tensor, x.tensor, part.weight, part.epsilon, part.weight_offset, std::nullopt);
    };
    norm(normed_, x_, parts_.input_norm);
    linear(qkv_, normed_, parts_.qkv, std::nullopt);
    const AttentionPart& part = parts_.attention;
    rope_and_write_kv(qkv_.tensor, batch_.positions, cos_sin_, k_cache_, v_cache_, batch_.slots,
                      part.q_norm, part.k_norm, part.epsilon, part.weight_offset, part.interleaved);
    if (out_.shape[0] == 0) return;  // nobody attends
    attention_->run(attention_scratch);
    if (rows_) {
        take(residual_, x_, *rows_);
        take(taken_, attended_, *rows_);
    }
    linear(middle_, taken_, parts_.output, residual_.tensor);
    norm(post_normed_, middle_, parts_.post_norm);
    parts_.gate_up.run_gated(gated_.tensor, gate_up_.tensor, post_normed_.tensor, parts_.activation,
                             workspace_.tensor);
    linear(out_, gated_, parts_.down, middle_.tensor);
}

DecoderLayers::DecoderLayers(const Tensor& out, const Tensor& x, const LayerBatch& batch,
                             const std::optional<Tensor>& rows)
    : out_(out), x_(x), batch_(batch) {
    cpu::require_cpu(kOp, x);
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense();
    const Check check(kOp, "out", out);
    if (rows) check_rows(*rows, x);
    const int64_t given = rows ? rows->size(0) : x.size(0);
    check.dtype(x.dtype).shape({given, x.size(1)}).dense().same_device(x);
    if (out.data == x.data && given) check.fail("other memory than that of x");
    if (given != x.size(0)) rows_ = &*rows;
}

void DecoderLayers::add(LayerParts parts, const Tensor& cos_sin, const Tensor& k_cache,
                        const Tensor& v_cache, bool is_last) {
    layers_.emplace_back(x_, batch_, std::move(parts), cos_sin, k_cache, v_cache,
                         is_last ? rows_ : nullptr);
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
        for (DecoderLayer& layer : layers_) {
            void* out = &layer == &layers_.back() ? out_.data : between_;
            layer.run(out, x, attention_scratch);
            x = out;
        }
    };
    hold_team(threads(), body);
}

}  // namespace sglite::ops
