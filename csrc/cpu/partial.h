// Vectors at the end of a row, of which there may be fewer elements than a vector has.
#pragma once

#include "cpu/simd.h"

namespace sglite::cpu::SGLITE_CPU_PATH {

// fill: what stands where nothing is left.
template <typename T>
static inline Vec load_some(const T* p, int64_t count, float fill = 0.0f) {
    return count >= Vec::kSize ? load(p) : load_partial(p, static_cast<int>(count), fill);
}

template <typename T>
static inline void store_some(T* p, Vec value, int64_t count) {
    if (count >= Vec::kSize) {
        store(p, value);
    } else {
        store_partial(p, value, static_cast<int>(count));
    }
}

}  // namespace sglite::cpu::SGLITE_CPU_PATH
