// The weight writer as a Python class.
#include "ops/weight_writer.h"

#include "python/bindings.h"
#include "python/quantized.h"
#include "python/torch_tensor.h"

namespace sglite {

void bind_weight_writer(py::module_& m) {
    using ops::WeightWriter;
    py::class_<WeightWriter>(m, "WeightWriter")
        .def(py::init<>())
        .def("pack", &WeightWriter::pack, py::arg("storage"), py::arg("n"), py::arg("k"),
             py::arg("start"), py::arg("rows"), py::arg("mapped"))
        .def(
            "quantize",
            [](WeightWriter& self, const QuantizedWeight& weight, int64_t start, const Tensor& rows,
               bool mapped) { self.quantize(named(weight), start, rows, mapped); },
            py::arg("weight"), py::arg("start"), py::arg("rows"), py::arg("mapped"))
        .def("run", &WeightWriter::run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace sglite
