// What each file of this folder adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace sglite {

void bind_batch_layout(pybind11::module_& m);
void bind_cache(pybind11::module_& m);
void bind_decoder_layers(pybind11::module_& m);
void bind_experts(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_snapshot(pybind11::module_& m);
void bind_weight_writer(pybind11::module_& m);

}  // namespace sglite
