// Scratch memory of the caller's, given out piece by piece to matrices that live for one call.
#pragma once

#include <initializer_list>

#include "tensor.h"

namespace sglite::ops {

constexpr int64_t kScratchAlignment = 64;

inline int64_t aligned(int64_t bytes) {
    return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

// Takes scratch memory: uint8, aligned, of at least so many bytes.
void check_scratch(const char* op, const char* name, const Tensor& scratch, int64_t size);

// A dense tensor of up to 3 dimensions, made of another's type and device; not to be copied.
struct ScratchTensor {
    int64_t shape[3], strides[3];
    Tensor tensor;

    ScratchTensor() = default;
    ScratchTensor(const ScratchTensor&) = delete;
    ScratchTensor& operator=(const ScratchTensor&) = delete;

    void set(void* data, const Tensor& like, std::initializer_list<int64_t> sizes);
    // Of the elements, rounded up to the alignment.
    int64_t bytes() const { return aligned(tensor.numel() * dtype_size(tensor.dtype)); }
};

}  // namespace sglite::ops
