// The activations of gated MLPs.
#pragma once

#include "cuda/primitives.cuh"

namespace sglite::cuda {

// x / (1 + exp(-y)), to the precision of the result's type: exact division and exponential would
// take longer than the memory does.
template <typename T>
__device__ inline float gate_by(float x, float y) {
    if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-y));
    return __fdividef(x, 1.0f + __expf(-y));
}

template <typename T, Activation kActivation>
__device__ inline float activate(float x) {
    if constexpr (kActivation == Activation::kSilu) {
        return gate_by<T>(x, x);
    } else if constexpr (kActivation == Activation::kGelu) {
        return x * 0.5f * erfcf(x * -0.70710678118654752f);
    } else {
        return gate_by<T>(x, 2.0f * 0.79788456080286536f * (x + 0.044715f * x * x * x));
    }
}

template <typename T>
__device__ inline float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::kSilu:
            return activate<T, Activation::kSilu>(x);
        case Activation::kGelu:
            return activate<T, Activation::kGelu>(x);
        default:
            return activate<T, Activation::kGeluTanh>(x);
    }
}

}  // namespace sglite::cuda
