#pragma once

#include <string>

#include "kernel_args.h"

namespace sglite::ops {

// "silu", "gelu" or "gelu_tanh"; throws, naming the op, for another name.
Activation activation_named(const char* op, const std::string& name);

}  // namespace sglite::ops
