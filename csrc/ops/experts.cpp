#include "ops/experts.h"

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "ops/activation.h"
#include "ops/held_team.h"
#include "ops/ranges.h"
#include "ops/scratch.h"

namespace sglite::ops {

namespace {

constexpr const char* kOp = "mix_experts";

}  // namespace

void route(const Tensor& weights, const Tensor& experts, const Tensor& logits, bool normalize) {
    constexpr const char* kRoute = "route";
    Check(kRoute, "logits", logits).dtype(DType::kFloat32).ndim(2).dense_rows();
    cpu::require_cpu(kRoute, logits);
    const int64_t rows = logits.size(0), num_experts = logits.size(1);
    const Check check(kRoute, "weights", weights);
    check.dtype(DType::kFloat32).shape({rows, -1}).dense().same_device(logits);
    const int64_t top_k = weights.size(1);
    if (top_k < 1 || top_k > num_experts) {
        throw std::invalid_argument("route: top_k: expected 1 to " + std::to_string(num_experts) +
                                    ", got " + std::to_string(top_k));
    }
    Check(kRoute, "experts", experts)
        .dtype(DType::kInt64)
        .shape({rows, top_k})
        .dense()
        .same_device(logits);
    cpu::kernels().route({
        .weights = weights.ptr<float>(),
        .experts = experts.ptr<int64_t>(),
        .logits = logits.ptr<const float>(),
        .rows = rows,
        .num_experts = num_experts,
        .top_k = top_k,
        .logits_stride = logits.stride(0),
        .normalize = normalize,
    });
}

std::vector<int64_t> used_experts(const Tensor& experts, int64_t num_experts) {
    Check(kOp, "experts", experts).dtype(DType::kInt64).ndim(2).dense();
    cpu::require_cpu(kOp, experts);
    const int64_t* numbers = experts.ptr<const int64_t>();
    const int64_t count = experts.numel();
    check_range(kOp, "experts", numbers, count, num_experts, "the layer");
    std::vector<bool> is_used(static_cast<size_t>(num_experts));
    for (int64_t i = 0; i < count; ++i) is_used[static_cast<size_t>(numbers[i])] = true;
    std::vector<int64_t> used;
    for (int64_t number = 0; number < num_experts; ++number) {
        if (is_used[static_cast<size_t>(number)]) used.push_back(number);
    }
    return used;
}

ExpertMix::ExpertMix(const Tensor& out, const Tensor& x, const Tensor& weights,
                     const Tensor& experts, std::vector<Expert> used, const std::string& activation)
    : out_(out),
      x_(x),
      weights_(weights),
      experts_(experts),
      used_(std::move(used)),
      activation_(activation) {
    Check(kOp, "x", x).ndim(2).dtype_in(kFloatTypes).dense_rows();
    cpu::require_cpu(kOp, x);
    const int64_t rows = x.size(0), hidden = x.size(1);
    Check(kOp, "out", out).dtype(x.dtype).shape({rows, hidden}).dense().same_device(x);
    Check(kOp, "weights", weights).dtype(DType::kFloat32).shape({rows, -1}).dense().same_device(x);
    Check(kOp, "experts", experts)
        .dtype(DType::kInt64)
        .shape({rows, weights.size(1)})
        .dense()
        .same_device(x);
    activation_named(kOp, activation);
    for (const Expert& expert : used_) {
        expert.gate_up.check_widths(kOp, "gate_up", 2 * expert.down.k(), hidden);
        expert.down.check_widths(kOp, "down", hidden, expert.down.k());
    }
    count_rows();
    const int64_t element = dtype_size(x.dtype);
    for (size_t i = 0; i < used_.size(); ++i) {
        const int64_t own = starts_[i + 1] - starts_[i];
        most_rows_ = std::max(most_rows_, own);
        const auto& [number, gate_up, down] = used_[i];
        if (gate_up.needs_both()) {
            gate_up_size_ = std::max(gate_up_size_, aligned(own * gate_up.n() * element));
        }
        gated_size_ = std::max(gated_size_, aligned(own * down.k() * element));
        for (const LinearPart* part : {&gate_up, &down}) {
            workspace_size_ = std::max(workspace_size_, part->workspace_size(kOp, own, x.dtype));
            cost_ += part->cost(own);
        }
    }
}

void ExpertMix::count_rows() {
    for (size_t i = 0; i < used_.size(); ++i) {
        const auto number = static_cast<size_t>(used_[i].number);
        if (index_of_.size() <= number) index_of_.resize(number + 1, -1);
        index_of_[number] = static_cast<int64_t>(i);
    }
    starts_.assign(used_.size() + 1, 0);
    const int64_t* numbers = experts_.ptr<const int64_t>();
    const int64_t top_k = experts_.size(1);
    // The row of each expert that was counted last: it comes there once.
    std::vector<int64_t> last(used_.size(), -1);
    for (int64_t i = 0; i < experts_.numel(); ++i) {
        const int64_t number = numbers[i], row = i / top_k;
        const bool is_known = number >= 0 && number < static_cast<int64_t>(index_of_.size());
        const int64_t index = is_known ? index_of_[static_cast<size_t>(number)] : -1;
        if (index < 0) {
            throw std::out_of_range(std::string(kOp) + ": experts[" + std::to_string(i) + "] is " +
                                    std::to_string(number) + ", whose weights are not there");
        }
        if (std::exchange(last[static_cast<size_t>(index)], row) == row) {
            throw std::invalid_argument(std::string(kOp) + ": experts: row " + std::to_string(row) +
                                        " goes to expert " + std::to_string(number) + " twice");
        }
        ++starts_[static_cast<size_t>(index) + 1];
    }
    for (size_t i = 0; i < used_.size(); ++i) starts_[i + 1] += starts_[i];
}

ExpertMix::Memory ExpertMix::memory_in(char* scratch) const {
    int64_t offset = 0;
    const auto take = [&](int64_t bytes) {
        char* taken = scratch ? scratch + offset : nullptr;
        offset += aligned(bytes);
        return taken;
    };
    const int64_t chosen = experts_.numel(), hidden = x_.size(1);
    const int64_t row_bytes = hidden * dtype_size(x_.dtype);
    Memory memory{};
    memory.rows = reinterpret_cast<int64_t*>(take(chosen * 8));
    memory.factors = reinterpret_cast<float*>(take(chosen * 4));
    memory.total = reinterpret_cast<float*>(take(x_.numel() * 4));
    memory.gathered = take(most_rows_ * row_bytes);
    memory.gate_up = take(gate_up_size_);
    memory.gated = take(gated_size_);
    memory.given = take(most_rows_ * row_bytes);
    memory.workspace = take(workspace_size_);
    memory.size = offset;
    return memory;
}

int64_t ExpertMix::scratch_size() const { return memory_in(nullptr).size; }

void ExpertMix::sort_rows(const Memory& memory) const {
    std::vector<int64_t> next = starts_;
    const int64_t* numbers = experts_.ptr<const int64_t>();
    const float* factors = weights_.ptr<const float>();
    const int64_t top_k = experts_.size(1);
    for (int64_t i = 0; i < experts_.numel(); ++i) {
        const int64_t index = index_of_[static_cast<size_t>(numbers[i])];
        const int64_t place = next[static_cast<size_t>(index)]++;
        memory.rows[place] = i / top_k;
        memory.factors[place] = factors[i];
    }
}

void ExpertMix::run_expert(const Memory& memory, size_t index) const {
    const auto& [number, gate_up, down] = used_[index];
    const int64_t start = starts_[index], count = starts_[index + 1] - start;
    const int64_t hidden = x_.size(1);
    ScratchTensor gathered, projected, gated, given, workspace;
    gathered.set(memory.gathered, x_, {count, hidden});
    projected.set(memory.gate_up, x_, {count, gate_up.n()});
    gated.set(memory.gated, x_, {count, down.k()});
    given.set(memory.given, x_, {count, hidden});
    workspace.set(memory.workspace, x_, {workspace_size_});
    workspace.tensor.dtype = DType::kUInt8;

    cpu::kernels().embedding({
        .out = memory.gathered,
        .ids = memory.rows + start,
        .table = x_.data,
        .packed = false,
        .count = count,
        .width = hidden,
        .out_stride = hidden,
        .table_stride = x_.stride(0),
        .dtype = x_.dtype,
    });
    gate_up.run_gated(gated.tensor, projected.tensor, gathered.tensor, activation_,
                      workspace.tensor);
    down.run(given.tensor, gated.tensor, std::nullopt, workspace.tensor);
    cpu::kernels().add_rows({
        .total = memory.total,
        .x = memory.given,
        .rows = memory.rows + start,
        .factors = memory.factors + start,
        .count = count,
        .width = hidden,
        .dtype = x_.dtype,
    });
}

void ExpertMix::run(const Tensor& scratch) {
    check_scratch(kOp, "scratch", scratch, scratch_size());
    const Memory memory = memory_in(scratch.ptr<char>());
    sort_rows(memory);
    const auto body = [&] {
        std::fill_n(memory.total, x_.numel(), 0.0f);
        for (size_t i = 0; i < used_.size(); ++i) run_expert(memory, i);
        cpu::kernels().round_values({
            .out = out_.data,
            .x = memory.total,
            .count = x_.numel(),
            .dtype = x_.dtype,
        });
    };
    const double count = static_cast<double>(std::max<size_t>(used_.size(), 1));
    hold_team(held_threads(cost_ / count), body);
}

}  // namespace sglite::ops
