// The check that every op makes on a packed weight (the layout is told in cpu/weight_panels.h).
#pragma once

#include "tensor.h"

namespace sglite::ops {

// Refuses a tensor that is not the storage of a packed weight [n, k].
void check_packed(const char* op, const char* name, const Tensor& storage, int64_t n, int64_t k);

}  // namespace sglite::ops
