// A checked view of a torch tensor: pointer, shape, strides, dtype, device. Knows no Python; made
// in python/torch_tensor.h, read by the ops, which turn it into raw pointers for the kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace sglite {

struct BFloat16 {
    uint16_t bits;
};
using Float16 = _Float16;

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt64, kInt32, kInt8, kUInt8, kBool };

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);  // in bytes

template <typename T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
    return DType::kFloat32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
    return DType::kBFloat16;
}
template <>
constexpr DType dtype_of<Float16>() {
    return DType::kFloat16;
}
template <>
constexpr DType dtype_of<int64_t>() {
    return DType::kInt64;
}
template <>
constexpr DType dtype_of<int32_t>() {
    return DType::kInt32;
}
template <>
constexpr DType dtype_of<int8_t>() {
    return DType::kInt8;
}
template <>
constexpr DType dtype_of<uint8_t>() {
    return DType::kUInt8;
}
template <>
constexpr DType dtype_of<bool>() {
    return DType::kBool;
}

enum class DeviceType : uint8_t { kCPU, kCUDA };

struct Tensor {
    void* data = nullptr;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;  // in elements
    int32_t ndim = 0;
    DType dtype = DType::kFloat32;
    DeviceType device = DeviceType::kCPU;
    int32_t device_index = 0;

    int64_t size(int axis) const { return shape[axis < 0 ? ndim + axis : axis]; }
    int64_t stride(int axis) const { return strides[axis < 0 ? ndim + axis : axis]; }
    int64_t numel() const {
        int64_t count = 1;
        for (int axis = 0; axis < ndim; ++axis) count *= shape[axis];
        return count;
    }
    bool is_contiguous() const {
        if (numel() == 0) return true;
        int64_t expected = 1;
        for (int axis = ndim - 1; axis >= 0; --axis) {
            if (shape[axis] != 1 && strides[axis] != expected) return false;
            expected *= shape[axis];
        }
        return true;
    }
    template <typename T>
    T* ptr() const {
        return static_cast<T*>(data);
    }
    std::string describe() const;  // "bfloat16[3, 576]"
};

// Names one argument of one op in error messages, and carries the checks, each of which returns
// the same object: `Check("rms_norm", "weight", weight).dtype(x.dtype).shape({width}).dense()`.
class Check {
  public:
    Check(const char* op, const char* name, const Tensor& tensor)
        : op_(op), name_(name), tensor_(tensor) {}

    const Check& dtype(DType expected) const;
    const Check& dtype_in(std::initializer_list<DType> allowed) const;
    const Check& ndim(int expected) const;
    // The shape must match; -1 stands for any size.
    const Check& shape(std::initializer_list<int64_t> expected) const;
    // Every element, row after row, without gaps.
    const Check& dense() const;
    // Elements of a row lie side by side; rows may be apart.
    const Check& dense_rows() const;
    const Check& same_device(const Tensor& other) const;

    [[noreturn]] void fail(const std::string& expected) const;

  private:
    const char* op_;
    const char* name_;
    const Tensor& tensor_;
};

// The floating-point types that kernels take.
constexpr std::initializer_list<DType> kFloatTypes = {DType::kFloat32, DType::kBFloat16,
                                                      DType::kFloat16};

}  // namespace sglite
