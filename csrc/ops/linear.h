// The checks that all linear ops make.
#pragma once

#include <optional>

#include "kernel_args.h"
#include "ops.h"
#include "ops/packed_weight.h"

namespace sglite::ops {

// Arguments of a layer with `n` outputs, without weight and workspace. Its weight has
// `weight_rows` rows: twice so many as outputs where gated.
LinearArgs checked_linear(const char* op, const Tensor& out, const Tensor& x, int64_t n,
                          int64_t weight_rows, DType weight_dtype,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& residual);

// Arguments of a layer on the CPU whose weight has n rows, gated where there is an activation.
LinearArgs checked_cpu_linear(const char* op, const Tensor& out, const Tensor& x, int64_t n,
                              DType weight_dtype, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual,
                              const std::optional<std::string>& activation);

// Whether a weight of n rows can be that of a gated layer: gate and up are whole panels.
inline bool can_be_gated(int64_t n) { return n % (2 * kPanelColumns) == 0; }

// Takes the workspace, which must have at least `wanted` bytes, on the device of `x`.
void attach_workspace(const char* op, LinearArgs& args, int64_t wanted,
                      const std::optional<Tensor>& workspace, const Tensor& x);

// Bytes that linear_quantized wants as its workspace for so many rows of x. Checks the weight.
int64_t quantized_workspace(const char* op, const QuantizedTensors& weight, int64_t rows,
                            DType dtype);

}  // namespace sglite::ops
