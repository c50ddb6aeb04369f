// The activations of gated MLPs.
#pragma once

#include "cuda/primitives.cuh"

namespace sglite::cuda {

template <Activation kActivation>
__device__ inline float activate(float x) {
    if constexpr (kActivation == Activation::kSilu) {
        return x / (1.0f + expf(-x));
    } else if constexpr (kActivation == Activation::kGelu) {
        return x * 0.5f * erfcf(x * -0.70710678118654752f);
    } else {
        const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));
    }
}

__device__ inline float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::kSilu:
            return activate<Activation::kSilu>(x);
        case Activation::kGelu:
            return activate<Activation::kGelu>(x);
        default:
            return activate<Activation::kGeluTanh>(x);
    }
}

}  // namespace sglite::cuda
