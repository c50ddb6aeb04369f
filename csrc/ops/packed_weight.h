// The checks that ops make on weights (the layouts are told in cpu/weight_panels.h and
// cpu/quantized_panels.h).
#pragma once

#include "kernel_args.h"
#include "ops.h"
#include "tensor.h"

namespace sglite::ops {

// Rows of a weight, which are columns of the result, in one panel.
constexpr int64_t kPanelColumns = 32;

// Refuses a tensor that is not the storage of a packed weight [n, k].
void check_packed(const char* op, const char* name, const Tensor& storage, int64_t n, int64_t k);

// Rows [start, start + count) of a packed weight, and of one to be quantised, as kernels take them.
PackRowsArgs pack_arguments(const char* op, const Tensor& storage, int64_t n, int64_t k,
                            int64_t start, const Tensor& rows);
QuantizeRowsArgs quantize_arguments(const QuantizedTensors& weight, int64_t start,
                                    const Tensor& rows);

}  // namespace sglite::ops
