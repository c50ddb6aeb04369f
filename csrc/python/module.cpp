// The module `sglite._C`.
#include "cpu/kernels.h"
#include "python/bindings.h"
#include "python/torch_tensor.h"

#ifdef SGLITE_CUDA
#include "cuda/device.h"
#endif

namespace sglite {

static void bind_machine(py::module_& m) {
    m.def("cpu_path", [] { return std::string(cpu::kernels().path); });
    m.def("available_cpu_paths", &cpu::available_paths);
    m.def("select_cpu_path", &cpu::select_path, py::arg("name"));
    m.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
    m.def("num_threads", &cpu::num_threads);
#ifdef SGLITE_CUDA
    m.attr("cuda_architectures") = SGLITE_CUDA;
    m.def("cuda_device_count", &cuda::device_count);
    m.def("cuda_running_architecture", [](const Tensor& out) {
        void* stream = nullptr;
        if (TorchTensors::get().api->current_stream(dlpack::kCUDA, out.device_index, &stream) !=
            0) {
            throw py::error_already_set();
        }
        cuda::running_architecture(out, stream);
    });
#else
    m.attr("cuda_architectures") = "";
#endif
}

}  // namespace sglite

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "Kernels and cache structures of sglite; use them through sglite.ops and sglite.cache.";
    sglite::bind_machine(m);
    sglite::bind_cache(m);
    sglite::bind_ops(m);
}
