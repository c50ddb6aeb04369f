// Mixtures of experts as Python functions.
#include "ops/experts.h"

#include "python/bindings.h"
#include "python/linear_part.h"
#include "python/torch_tensor.h"

namespace sglite {

void bind_experts(py::module_& m) {
    m.def(
        "route",
        [](const Tensor& weights, const Tensor& experts, const Tensor& logits, bool normalize) {
            ReleaseGilIfLong release(static_cast<double>(logits.numel()) * 4);
            ops::route(weights, experts, logits, normalize);
        },
        py::arg("weights"), py::arg("experts"), py::arg("logits"), py::arg("normalize"));
    m.def("used_experts", &ops::used_experts, py::arg("experts"), py::arg("num_experts"));
    m.def(
        "on_gpu", [](const Tensor& tensor) { return tensor.device == DeviceType::kCUDA; },
        py::arg("tensor"));
    // `empty` makes a workspace: a uint8 tensor of the given number of bytes, on the device.
    m.def(
        "mix_experts_cuda",
        [](const Tensor& out, const Tensor& x, const Tensor& weights, const Tensor& experts,
           const std::vector<Tensor>& gate_up, const std::vector<Tensor>& down,
           const std::string& activation, const py::function& empty) {
            py::object workspace;
            return ops::mix_experts_cuda(out, x, weights, experts, gate_up, down, activation,
                                         [&](int64_t size) {
                                             workspace = empty(size);
                                             return workspace.cast<Tensor>();
                                         });
        },
        py::arg("out"), py::arg("x"), py::arg("weights"), py::arg("experts"), py::arg("gate_up"),
        py::arg("down"), py::arg("activation"), py::arg("empty"));
    // `used` holds number, gate_up and down of each expert that is used; `empty` makes scratch
    // memory: a uint8 tensor of the given number of bytes.
    m.def(
        "mix_experts",
        [](const Tensor& out, const Tensor& x, const Tensor& weights, const Tensor& experts,
           const std::vector<std::tuple<int64_t, LinearPart, LinearPart>>& used,
           const std::string& activation, const py::function& empty) {
            std::vector<ops::Expert> parts;
            parts.reserve(used.size());
            for (const auto& [number, gate_up, down] : used) {
                parts.push_back({number, named(gate_up), named(down)});
            }
            ops::ExpertMix mix(out, x, weights, experts, std::move(parts), activation);
            const py::object scratch = empty(mix.scratch_size());
            const auto view = scratch.cast<Tensor>();
            ReleaseGilIfLong release(mix.cost());
            mix.run(view);
        },
        py::arg("out"), py::arg("x"), py::arg("weights"), py::arg("experts"), py::arg("used"),
        py::arg("activation"), py::arg("empty"));
}

}  // namespace sglite
