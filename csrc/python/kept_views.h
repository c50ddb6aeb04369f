// Views of tensors that are kept from call to call.
#pragma once

#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "python/torch_tensor.h"

namespace sglite {

// The tensors within an argument that was converted once, to be looked at anew in every call: they
// may have got other memory.
//
// A step's weights have emptied the caches, and a few hundred tensors come from memory. They are
// asked for ahead of the one looked at, as waiting for one after the other is nearly all that it
// takes.
class KeptViews {
  public:
    // object: what `value` was converted from, of tuples all the way down; both have to stay.
    template <typename T>
    void add(PyObject* object, T& value) {
        if constexpr (std::is_same_v<T, Tensor>) {
            sources_.push_back({object, &value, value.shape});
        }
    }
    template <typename T>
    void add(PyObject* object, std::optional<T>& value) {
        if (value) add(object, *value);
    }
    template <typename... T>
    void add(PyObject* object, std::variant<T...>& value) {
        std::visit([&](auto& held) { add(object, held); }, value);
    }
    template <typename... T>
    void add(PyObject* object, std::tuple<T...>& value) {
        if (!PyTuple_Check(object)) throw py::type_error("expected tuples all the way down");
        [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
            (add(PyTuple_GET_ITEM(object, kIndex), std::get<kIndex>(value)), ...);
        }(std::index_sequence_for<T...>{});
    }

    void refresh() {
        for (size_t i = 0; i < sources_.size(); ++i) {
            if (i + kAhead < sources_.size()) prefetch(sources_[i + kAhead]);
            *sources_[i].view = view_of(sources_[i].object);
        }
    }

  private:
    struct Source {
        PyObject* object;
        Tensor* view;
        const int64_t* shape;  // where it was once, which is within what torch has of a tensor
    };

    static constexpr size_t kAhead = 12;

    static void prefetch(const Source& source) {
        __builtin_prefetch(source.object);
        const char* inside = reinterpret_cast<const char*>(source.shape);
        for (int line = -1; line <= 1; ++line) __builtin_prefetch(inside + 64 * line);
        __builtin_prefetch(source.view, 1);
    }

    std::vector<Source> sources_;
};

}  // namespace sglite
