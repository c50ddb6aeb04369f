// The module `sglite._C`.
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "python/bindings.h"
#include "python/torch_tensor.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifdef SGLITE_CUDA
#include "cuda/device.h"
#include "cuda/kernels.h"
#endif

namespace sglite {

#ifdef SGLITE_CUDA
// torch's current stream. Called without the lock of Python as well.
static void* torch_stream(int device) {
#ifdef SGLITE_EMULATED
    (void)device;
    return nullptr;
#else
    void* stream = nullptr;
    if (TorchTensors::get().api->current_stream(dlpack::kCUDA, device, &stream) != 0) {
        throw std::runtime_error("torch has no current CUDA stream on device " +
                                 std::to_string(device));
    }
    return stream;
#endif
}
#endif

// Pages that malloc keeps although nothing in them is in use.
static void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

static void bind_machine(py::module_& m) {
    m.def("cpu_path", [] { return std::string(cpu::kernels().path); });
    m.def("available_cpu_paths", &cpu::available_paths);
    m.def("select_cpu_path", &cpu::select_path, py::arg("name"));
    m.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
    m.def("num_threads", &cpu::num_threads);
    m.def("pause_teams", &cpu::pause_teams);
    m.def("trim_heap", &trim_heap, py::call_guard<py::gil_scoped_release>());
#ifdef SGLITE_CUDA
    cuda::install(&cuda::table, &torch_stream);
    m.attr("cuda_architectures") = SGLITE_CUDA;
    m.def("cuda_device_count", &cuda::device_count);
    m.def("cuda_running_architecture",
          [](const Tensor& out) { cuda::running_architecture(out, cuda::stream_of(out)); });
#else
    m.attr("cuda_architectures") = "";
#endif
#ifdef SGLITE_EMULATED
    m.def("emulate_cuda", [](bool on) { TorchTensors::is_emulating() = on; }, py::arg("on"));
#endif
}

}  // namespace sglite

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "Kernels and cache structures of sglite; use them through sglite.ops and sglite.cache.";
    sglite::bind_machine(m);
    sglite::bind_batch_layout(m);
    sglite::bind_cache(m);
    sglite::bind_ops(m);
    sglite::bind_snapshot(m);
    sglite::bind_weight_writer(m);
    sglite::bind_decoder_layers(m);
    sglite::bind_experts(m);
}
