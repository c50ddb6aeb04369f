// A linear layer as a part of a larger op on the CPU.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "ops.h"

namespace sglite::ops {

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

    // Takes no other weight than [n, k]; the message names the op and the part.
    void check_widths(const char* op, const char* name, int64_t n, int64_t k) const;
    // Of a product with so many rows, in bytes and in floating-point operations.
    int64_t workspace_size(const char* op, int64_t rows, DType dtype) const;
    double cost(int64_t rows) const;

    // out = x W^T + bias, + residual.
    void run(const Tensor& out, const Tensor& x, const std::optional<Tensor>& residual,
             const Tensor& workspace) const;
    // Whether a gated layer needs room for the product: its halves are not whole panels.
    bool needs_both() const;
    // out = activation(gate) * up of such an out. both: [rows, n], where needs_both().
    void run_gated(const Tensor& out, const Tensor& both, const Tensor& x,
                   const std::string& activation, const Tensor& workspace) const;

  private:
    void multiply(const Tensor& out, const Tensor& x, const std::optional<Tensor>& residual,
                  const Tensor& workspace, const std::optional<std::string>& activation) const;
};

}  // namespace sglite::ops
