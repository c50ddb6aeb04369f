// How a quantised weight comes from Python.
#pragma once

#include "ops.h"
#include "python/torch_tensor.h"

namespace sglite {

// Codes, scales, zeros or None, n, k, group size; see sglite/ops/quantized_weight.py.
using QuantizedWeight =
    std::tuple<Tensor, Tensor, std::optional<Tensor>, int64_t, int64_t, int64_t>;

inline ops::QuantizedTensors named(const QuantizedWeight& weight) {
    return std::make_from_tuple<ops::QuantizedTensors>(weight);
}

}  // namespace sglite
