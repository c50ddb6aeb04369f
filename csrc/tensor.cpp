#include "tensor.h"

namespace sglite {

int64_t dtype_size(DType dtype) {
    switch (dtype) {
        case DType::kInt64:
            return 8;
        case DType::kFloat32:
        case DType::kInt32:
            return 4;
        case DType::kBFloat16:
        case DType::kFloat16:
            return 2;
        default:
            return 1;
    }
}

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kFloat16:
            return "float16";
        case DType::kInt64:
            return "int64";
        case DType::kInt32:
            return "int32";
        case DType::kInt8:
            return "int8";
        case DType::kUInt8:
            return "uint8";
        case DType::kBool:
            return "bool";
    }
    return "unknown";
}

static std::string shape_text(const int64_t* sizes, int count) {
    std::string text = "[";
    for (int axis = 0; axis < count; ++axis) {
        if (axis) text += ", ";
        text += sizes[axis] < 0 ? "any" : std::to_string(sizes[axis]);
    }
    return text + "]";
}

std::string Tensor::describe() const { return dtype_name(dtype) + shape_text(shape, ndim); }

void Check::fail(const std::string& expected) const {
    throw std::invalid_argument(std::string(op_) + ": " + name_ + ": expected " + expected +
                                ", got " + tensor_.describe());
}

const Check& Check::dtype(DType expected) const {
    if (tensor_.dtype != expected) fail(dtype_name(expected));
    return *this;
}

const Check& Check::dtype_in(std::initializer_list<DType> allowed) const {
    std::string names;
    for (DType candidate : allowed) {
        if (tensor_.dtype == candidate) return *this;
        names += (names.empty() ? "" : " or ") + std::string(dtype_name(candidate));
    }
    fail(names);
}

const Check& Check::ndim(int expected) const {
    if (tensor_.ndim != expected) fail(std::to_string(expected) + " dimensions");
    return *this;
}

const Check& Check::shape(std::initializer_list<int64_t> expected) const {
    bool same = tensor_.ndim == static_cast<int>(expected.size());
    for (int axis = 0; same && axis < tensor_.ndim; ++axis) {
        const int64_t wanted = expected.begin()[axis];
        same = wanted < 0 || wanted == tensor_.shape[axis];
    }
    if (!same) fail("shape " + shape_text(expected.begin(), static_cast<int>(expected.size())));
    return *this;
}

const Check& Check::dense() const {
    if (!tensor_.is_contiguous()) {
        fail("a contiguous tensor (strides " + shape_text(tensor_.strides, tensor_.ndim) + ")");
    }
    return *this;
}

const Check& Check::dense_rows() const {
    if (tensor_.ndim == 0 || (tensor_.stride(-1) != 1 && tensor_.size(-1) > 1)) {
        fail("rows without gaps (strides " + shape_text(tensor_.strides, tensor_.ndim) + ")");
    }
    return *this;
}

const Check& Check::same_device(const Tensor& other) const {
    if (tensor_.device != other.device || tensor_.device_index != other.device_index) {
        fail("the device of the op's other tensors");
    }
    return *this;
}

}  // namespace sglite
