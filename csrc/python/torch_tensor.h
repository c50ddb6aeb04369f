// How a torch tensor becomes a `Tensor` argument, through torch's DLPack exchange table. This
// folder is the only one that knows Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "dlpack.h"
#include "tensor.h"

namespace py = pybind11;

namespace sglite {

// The table of torch.Tensor, read once; the type is kept to recognise its subclasses (Parameter).
struct TorchTensors {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;

    static const TorchTensors& get() {
        static const TorchTensors instance = load();
        return instance;
    }

#ifdef SGLITE_EMULATED
    // Whether tensors on the CPU count as ones on a GPU, for tests of the CUDA kernels without one.
    static bool& is_emulating() {
        static bool emulating = false;
        return emulating;
    }
#else
    static constexpr bool is_emulating() { return false; }
#endif

  private:
    static TorchTensors load() {
        py::object type = py::module_::import("torch").attr("Tensor");
        if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
            throw py::import_error(
                "sglite needs torch 2.11 or newer: this torch has no DLPack C exchange API");
        }
        py::object capsule = type.attr("__dlpack_c_exchange_api__");
        auto* api = static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (!api) throw py::error_already_set();
        if (api->version.major != dlpack::kMajorVersion) {
            throw py::import_error("sglite: torch's DLPack exchange API has another major version");
        }
        return {reinterpret_cast<PyTypeObject*>(type.release().ptr()), api};
    }
};

inline DType dtype_from(const dlpack::DataType& type) {
    if (type.lanes == 1) {
        switch (type.code * 256 + type.bits) {
            case dlpack::kFloat * 256 + 32:
                return DType::kFloat32;
            case dlpack::kFloat * 256 + 16:
                return DType::kFloat16;
            case dlpack::kBFloat * 256 + 16:
                return DType::kBFloat16;
            case dlpack::kInt * 256 + 64:
                return DType::kInt64;
            case dlpack::kInt * 256 + 32:
                return DType::kInt32;
            case dlpack::kInt * 256 + 8:
                return DType::kInt8;
            case dlpack::kUInt * 256 + 8:
                return DType::kUInt8;
            case dlpack::kBool * 256 + 8:
                return DType::kBool;
        }
    }
    throw py::type_error("a tensor's dtype is one that no sglite op takes");
}

inline Tensor view_of(PyObject* object) {
    dlpack::Tensor source;
    if (TorchTensors::get().api->tensor_from_object(object, &source) != 0) {
        throw py::error_already_set();
    }
    if (source.device.type != dlpack::kCPU && source.device.type != dlpack::kCUDA &&
        source.device.type != dlpack::kCUDAHost) {
        throw py::type_error("sglite ops take tensors on the CPU or on a CUDA device");
    }
    return {.data = static_cast<char*>(source.data) + source.byte_offset,
            .shape = source.shape,
            .strides = source.strides,
            .ndim = source.ndim,
            .dtype = dtype_from(source.dtype),
            .device = source.device.type == dlpack::kCUDA || TorchTensors::is_emulating()
                          ? DeviceType::kCUDA
                          : DeviceType::kCPU,
            .device_index = source.device.index};
}

}  // namespace sglite

namespace pybind11::detail {

// Any torch.Tensor as an argument; the view lives as long as the call holds the tensor.
template <>
struct type_caster<sglite::Tensor> {
    PYBIND11_TYPE_CASTER(sglite::Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (!PyObject_TypeCheck(source.ptr(), sglite::TorchTensors::get().type)) return false;
        value = sglite::view_of(source.ptr());
        return true;
    }
};

}  // namespace pybind11::detail

namespace sglite {

// Lets other Python threads run during work of at least `cost` floating-point operations or bytes.
// Shorter work keeps the lock: giving it up may cost a switch interval (5 ms) to get it back.
class ReleaseGilIfLong {
  public:
    explicit ReleaseGilIfLong(double cost) {
        constexpr double kLong = 4e6;
        if (cost >= kLong) release_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> release_;
};

}  // namespace sglite
