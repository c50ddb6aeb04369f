// How a linear layer that is a part of a larger op comes from Python.
#pragma once

#include "ops/linear_part.h"
#include "python/quantized.h"

namespace sglite {

// Storage, n, k; see sglite/ops/packed_weight.py.
using PackedWeight = std::tuple<Tensor, int64_t, int64_t>;

// Fields in the order of sglite/ops/decoder_layers.py.
using LinearPart = std::tuple<std::variant<PackedWeight, QuantizedWeight>, std::optional<Tensor>>;

inline ops::LinearPart named(const LinearPart& part) {
    const auto& [weight, bias] = part;
    if (const auto* packed = std::get_if<PackedWeight>(&weight)) {
        return {std::make_from_tuple<ops::PackedTensors>(*packed), bias};
    }
    return {named(std::get<QuantizedWeight>(weight)), bias};
}

}  // namespace sglite
