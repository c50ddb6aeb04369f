// From what is known at run time to template arguments.
#pragma once

#include <initializer_list>

#include "cuda/primitives.cuh"

namespace sglite::cuda {

// Calls `body` with a value of the element type that kernels use for `dtype`.
template <typename Body>
void visit_float_type(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kBFloat16:
            return body(BFloat16{});
        case DType::kFloat16:
            return body(Half{});
        default:
            throw std::invalid_argument(std::string("expected a floating-point dtype, got ") +
                                        dtype_name(dtype));
    }
}

// Whether rows that are so many elements apart, from these pointers on, all start at a multiple of
// 16 bytes. A null pointer counts as one.
template <typename T>
bool aligned16(std::initializer_list<int64_t> strides, std::initializer_list<const void*> starts) {
    bool aligned = true;
    for (int64_t stride : strides) aligned &= stride * sizeof(T) % 16 == 0;
    for (const void* start : starts) aligned &= reinterpret_cast<uintptr_t>(start) % 16 == 0;
    return aligned;
}

}  // namespace sglite::cuda
