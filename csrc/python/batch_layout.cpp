// A step's requests laid out in one call.
#include "batch_layout.h"

#include <pybind11/numpy.h>

#include <vector>

#include "python/bindings.h"
#include "python/torch_tensor.h"

namespace sglite {

// The first `count` elements of a numpy array of one dimension.
template <typename T>
static std::span<const T> elements(const py::handle& object, int64_t count, const char* name) {
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
        throw py::type_error(std::string("lay_out: ") + name +
                             ": expected contiguous numpy arrays of " +
                             (sizeof(T) == 8 ? "int64" : "int32"));
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (array.ndim() != 1 || count < 0 || count > array.size()) {
        throw py::value_error(std::string("lay_out: ") + name + ": expected an array of " +
                              std::to_string(count) + " elements or more in one dimension");
    }
    return {static_cast<const T*>(array.data()), static_cast<size_t>(count)};
}

void bind_batch_layout(py::module_& m) {
    m.def(
        "lay_out",
        [](const py::list& token_ids, const py::list& pages, const std::vector<int64_t>& num_pages,
           const std::vector<int64_t>& starts, const std::vector<int64_t>& stops,
           int64_t page_size) {
            const size_t count = starts.size();
            if (token_ids.size() != count || pages.size() != count || num_pages.size() != count ||
                stops.size() != count || page_size < 1) {
                throw py::value_error("lay_out: expected lists of one length, a page_size above 0");
            }
            std::vector<ScheduledTokens> requests;
            requests.reserve(count);
            int64_t tokens = 0, width = 0;
            for (size_t i = 0; i < count; ++i) {
                requests.push_back({elements<int64_t>(token_ids[i], stops[i], "token_ids"),
                                    elements<int32_t>(pages[i], num_pages[i], "pages"), starts[i],
                                    stops[i]});
                tokens += stops[i] > starts[i] ? stops[i] - starts[i] : 0;
                width = num_pages[i] > width ? num_pages[i] : width;
            }
            const auto rows = static_cast<py::ssize_t>(count);
            py::array_t<int64_t> input_ids(tokens), positions(tokens), slots(tokens);
            py::array_t<int32_t> query_start(rows + 1), kv_lens(rows), kv_end(tokens);
            py::array_t<int32_t> page_table({rows, static_cast<py::ssize_t>(width)});
            lay_out(requests, {
                                  .input_ids = input_ids.mutable_data(),
                                  .positions = positions.mutable_data(),
                                  .slots = slots.mutable_data(),
                                  .query_start = query_start.mutable_data(),
                                  .kv_lens = kv_lens.mutable_data(),
                                  .kv_end = kv_end.mutable_data(),
                                  .page_table = page_table.mutable_data(),
                                  .table_width = width,
                                  .page_size = page_size,
                              });
            return py::make_tuple(input_ids, positions, slots, query_start, kv_lens, kv_end,
                                  page_table);
        },
        py::arg("token_ids"), py::arg("pages"), py::arg("num_pages"), py::arg("starts"),
        py::arg("stops"), py::arg("page_size"));
}

}  // namespace sglite
