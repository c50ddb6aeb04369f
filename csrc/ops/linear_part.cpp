#include "ops/linear_part.h"

#include "cpu/kernels.h"
#include "ops/activation.h"
#include "ops/linear.h"

namespace sglite::ops {

void LinearPart::check_widths(const char* op, const char* name, int64_t wanted_n,
                              int64_t wanted_k) const {
    if (n() == wanted_n && k() == wanted_k) return;
    throw std::invalid_argument(std::string(op) + ": " + name + ": expected a weight [" +
                                std::to_string(wanted_n) + ", " + std::to_string(wanted_k) +
                                "], got [" + std::to_string(n()) + ", " + std::to_string(k()) +
                                "]");
}

int64_t LinearPart::workspace_size(const char* op, int64_t rows, DType dtype) const {
    if (const auto* quantized = std::get_if<QuantizedTensors>(&weight)) {
        return quantized_workspace(op, *quantized, rows, dtype);
    }
    return cpu::kernels().linear_workspace(rows, k(), dtype);
}

double LinearPart::cost(int64_t rows) const {
    return 2.0 * static_cast<double>(rows * n()) * static_cast<double>(k());
}

void LinearPart::multiply(const Tensor& out, const Tensor& x, const std::optional<Tensor>& residual,
                          const Tensor& workspace,
                          const std::optional<std::string>& activation) const {
    if (const auto* packed = std::get_if<PackedTensors>(&weight)) {
        linear_packed(out, x, packed->storage, packed->n, packed->k, bias, residual, workspace,
                      activation);
    } else {
        linear_quantized(out, x, std::get<QuantizedTensors>(weight), bias, residual, workspace,
                         activation);
    }
}

void LinearPart::run(const Tensor& out, const Tensor& x, const std::optional<Tensor>& residual,
                     const Tensor& workspace) const {
    multiply(out, x, residual, workspace, std::nullopt);
}

bool LinearPart::needs_both() const { return !can_be_gated(n()); }

void LinearPart::run_gated(const Tensor& out, const Tensor& both, const Tensor& x,
                           const std::string& activation, const Tensor& workspace) const {
    if (!needs_both()) return multiply(out, x, std::nullopt, workspace, activation);
    multiply(both, x, std::nullopt, workspace, std::nullopt);
    constexpr const char* kOp = "gated linear";
    gated_activation(kOp, out, both, activation_named(kOp, activation));
}

}  // namespace sglite::ops
