// Whole decoder layers as one Python function.
#include "ops/decoder_layers.h"

#include "python/bindings.h"
#include "python/kept_views.h"
#include "python/linear_part.h"
#include "python/torch_tensor.h"

namespace sglite {

namespace {

using Norm = std::tuple<Tensor, double, double>;
using Attention = std::tuple<std::optional<Tensor>, std::optional<Tensor>, double, double, bool,
                             double, std::optional<int64_t>, std::optional<double>>;
using Batch = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Fields in the order of sglite/ops/decoder_layers.py.
using Parts =
    std::tuple<Norm, LinearPart, Attention, LinearPart, Norm, LinearPart, std::string, LinearPart>;
using Layer = std::tuple<Parts, Tensor, Tensor, Tensor>;

ops::LayerParts named(const Parts& parts) {
    const auto norm = [](const Norm& part) { return std::make_from_tuple<ops::NormPart>(part); };
    const auto& [input_norm, qkv, attention, output, post_norm, gate_up, activation, down] = parts;
    return {
        .input_norm = norm(input_norm),
        .qkv = named(qkv),
        .attention = std::make_from_tuple<ops::AttentionPart>(attention),
        .output = named(output),
        .post_norm = norm(post_norm),
        .gate_up = named(gate_up),
        .activation = activation,
        .down = named(down),
    };
}

// What the op reads of a tuple of layers, converted once for many calls.
class LayerViews {
  public:
    LayerViews(const py::tuple& given, std::vector<Layer> layers)
        : made_of_(given.ptr()), layers_(std::move(layers)) {
        for (size_t i = 0; i < layers_.size(); ++i) {
            views_.add(PyTuple_GET_ITEM(made_of_, static_cast<Py_ssize_t>(i)), layers_[i]);
        }
    }

    // given: the tuple that this was made of, which the caller keeps.
    const std::vector<Layer>& of(const py::tuple& given) {
        if (given.ptr() != made_of_) {
            throw py::value_error("decoder_layers: views: expected those of the layers");
        }
        views_.refresh();
        return layers_;
    }

  private:
    PyObject* const made_of_;
    std::vector<Layer> layers_;
    KeptViews views_;
};

}  // namespace

void bind_decoder_layers(py::module_& m) {
    py::class_<LayerViews>(m, "LayerViews")
        .def(py::init<const py::tuple&, std::vector<Layer>>(), py::arg("layers"),
             py::arg("converted"));
    // `scratch(index, bytes)` gives memory: a uint8 tensor of at least so many bytes.
    m.def(
        "decoder_layers",
        [](const Tensor& out, const Tensor& x, const Batch& batch, const py::tuple& layers,
           LayerViews& views, const py::function& scratch, const std::optional<Tensor>& rows) {
            const auto named_batch = std::make_from_tuple<ops::LayerBatch>(batch);
            ops::DecoderLayers run(out, x, named_batch, rows);
            const std::vector<Layer>& given = views.of(layers);
            for (const Layer& layer : given) {
                const auto& [parts, cos_sin, k_cache, v_cache] = layer;
                run.add(named(parts), cos_sin, k_cache, v_cache, &layer == &given.back());
            }
            const py::object activations = scratch(0, run.activation_size());
            run.use_activations(activations.cast<Tensor>());
            const py::object workspace = scratch(1, run.attention_size());
            const auto view = workspace.cast<Tensor>();
            ReleaseGilIfLong release(run.cost());
            run.run(view);
        },
        py::arg("out"), py::arg("x"), py::arg("batch"), py::arg("layers"), py::arg("views"),
        py::arg("scratch"), py::arg("rows"));
}

}  // namespace sglite
