#include "ops/scratch.h"

#include <algorithm>

namespace sglite::ops {

void check_scratch(const char* op, const char* name, const Tensor& scratch, int64_t size) {
    const Check check(op, name, scratch);
    check.dtype(DType::kUInt8).ndim(1).dense();
    if (scratch.size(0) < size || reinterpret_cast<uintptr_t>(scratch.data) % kScratchAlignment) {
        check.fail(std::to_string(size) + " bytes, aligned to " +
                   std::to_string(kScratchAlignment));
    }
}

void ScratchTensor::set(void* data, const Tensor& like, std::initializer_list<int64_t> sizes) {
    std::copy(sizes.begin(), sizes.end(), shape);
    int64_t stride = 1;
    for (int axis = static_cast<int>(sizes.size()) - 1; axis >= 0; --axis) {
        strides[axis] = stride;
        stride *= shape[axis];
    }
    tensor = like;
    tensor.data = data;
    tensor.shape = shape;
    tensor.strides = strides;
    tensor.ndim = static_cast<int32_t>(sizes.size());
}

}  // namespace sglite::ops
