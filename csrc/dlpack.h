// The part of DLPack's C ABI (version 1.x, https://dmlc.github.io/dlpack) that this library uses: a
// tensor description and the exchange table that torch publishes as
// `torch.Tensor.__dlpack_c_exchange_api__`. Field order and sizes are the specification's.
#pragma once

#include <cstdint>

namespace sglite::dlpack {

struct Version {
    uint32_t major;
    uint32_t minor;
};

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };

enum TypeCode : uint8_t {
    kInt = 0,
    kUInt = 1,
    kFloat = 2,
    kBFloat = 4,
    kBool = 6,
    kFloat8E4M3 = 10
};

struct Device {
    int32_t type;
    int32_t index;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

// Strides count elements. The shape and stride arrays belong to the exporting tensor.
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

// The exchange table. Entries this library does not call are plain pointers.
struct ExchangeApi {
    Version version;
    void* previous_api;
    void* managed_tensor_allocator;
    void* managed_tensor_from_object;
    void* managed_tensor_to_object;
    // Fills `out` with a view that lives as long as `object`; 0, or -1 with a Python error set.
    int (*tensor_from_object)(void* object, Tensor* out);
    // The stream that the framework works on; 0, or -1 with a Python error set.
    int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

constexpr uint32_t kMajorVersion = 1;

}  // namespace sglite::dlpack
