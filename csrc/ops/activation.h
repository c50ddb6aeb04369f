#pragma once

#include <string>

#include "kernel_args.h"
#include "tensor.h"

namespace sglite::ops {

// out = activation(gate) * up. Shapes: x [rows, 2 * width], gate, then up; out [rows, width].
void gated_activation(const char* op, const Tensor& out, const Tensor& x, Activation activation);

// "silu", "gelu" or "gelu_tanh"; throws, naming the op, for another name.
Activation activation_named(const char* op, const std::string& name);

}  // namespace sglite::ops
