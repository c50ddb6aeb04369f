// Mixture of experts: which experts a row goes to, and what they give together.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ops/linear_part.h"
#include "tensor.h"

namespace sglite::ops {

// The experts with the largest logits of each row, the first of equal ones, largest first: their
// softmax, divided by its sum over them where `normalize`. Shapes: weights [rows, top_k] float32;
// experts [rows, top_k] int64; logits [rows, num_experts] float32.
void route(const Tensor& weights, const Tensor& experts, const Tensor& logits, bool normalize);

// The different numbers in `experts` [rows, top_k] int64, ascending, all below num_experts.
std::vector<int64_t> used_experts(const Tensor& experts, int64_t num_experts);

// On CUDA: what ExpertMix gives, for plain weights, without waiting for the device. `out` and the
// rest as there; gate_up and down: [num_experts]. False, and nothing done, where the kernel does
// not take them. `empty` makes a workspace: a uint8 tensor of so many bytes on the device.
bool mix_experts_cuda(const Tensor& out, const Tensor& x, const Tensor& weights,
                      const Tensor& experts, const std::vector<Tensor>& gate_up,
                      const std::vector<Tensor>& down, const std::string& activation,
                      const std::function<Tensor(int64_t)>& empty);

// On the CPU: one expert that is used.
struct Expert {
    int64_t number;
    LinearPart gate_up;  // [2 * width, hidden]: gate, then up
    LinearPart down;     // [hidden, width]
};

// out[i] = sum over j of weights[i, j] * down_e(activation(gate_up_e(x[i]))), e = experts[i, j]:
// a float32 sum over ascending e, rounded once. Used once: made, given scratch, run.
class ExpertMix {
  public:
    // out, x: [rows, hidden]. weights: [rows, top_k] float32. experts: like weights, int64; those
    // of a row differ. used: what used_experts() says, in this order.
    ExpertMix(const Tensor& out, const Tensor& x, const Tensor& weights, const Tensor& experts,
              std::vector<Expert> used, const std::string& activation);

    int64_t scratch_size() const;          // of run()'s, in bytes
    double cost() const { return cost_; }  // in floating-point operations
    void run(const Tensor& scratch);       // scratch: uint8, aligned to 64

  private:
    // Memory of scratch, all that one run needs.
    struct Memory {
        int64_t* rows;   // by expert, then ascending: the rows that go there
        float* factors;  // and their weights
        float* total;    // [rows, hidden]
        char *gathered, *gate_up, *gated, *given, *workspace;
        int64_t size;
    };

    void count_rows();
    Memory memory_in(char* scratch) const;  // null: the size alone
    void sort_rows(const Memory& memory) const;
    void run_expert(const Memory& memory, size_t index) const;

    const Tensor &out_, &x_, &weights_, &experts_;
    const std::vector<Expert> used_;
    const std::string activation_;
    std::vector<int64_t> index_of_;  // in used_, of an expert's number; -1: none
    std::vector<int64_t> starts_;    // in the sorted rows, of each used expert, and their end
    int64_t most_rows_ = 0, gate_up_size_ = 0, gated_size_ = 0, workspace_size_ = 0;
    double cost_ = 0;
};

}  // namespace sglite::ops
