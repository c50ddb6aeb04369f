// The page pool and the radix tree as Python classes.
#include <pybind11/numpy.h>

#include <span>

#include "page_pool.h"
#include "python/bindings.h"
#include "python/torch_tensor.h"
#include "radix_tree.h"

namespace sglite {

// A numpy array's elements where they lie. The dtype must match: a silent conversion would copy
// a long prompt in every call.
template <typename T>
static std::span<const T> elements(const py::array& array, const char* name) {
    if (!array.dtype().equal(py::dtype::of<T>()) || array.ndim() != 1 ||
        !(array.flags() & py::array::c_style)) {
        throw py::type_error(
            py::str("{}: expected a contiguous numpy array of dtype {} with one dimension, got "
                    "dtype {} and shape {}{}")
                .format(name, py::dtype::of<T>(), array.dtype(), array.attr("shape"),
                        array.flags() & py::array::c_style ? "" : ", not contiguous")
                .template cast<std::string>());
    }
    return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <typename T>
static py::array_t<T> numpy_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// These keep the GIL: the longest call, a prompt of 100,000 tokens, takes well under a
// millisecond, giving the lock up may cost more (see ReleaseGilIfLong), and the lock is what
// keeps two threads out of one tree.
void bind_cache(py::module_& m) {
    py::register_exception<OutOfPages>(m, "OutOfPages", PyExc_RuntimeError);

    py::class_<PagePool, std::shared_ptr<PagePool>>(m, "PagePool")
        .def(py::init<std::int64_t, std::int64_t>(), py::arg("num_pages"),
             py::arg("num_reserved") = 1)
        .def(
            "allocate",
            [](PagePool& pool, std::int64_t count) { return numpy_array(pool.allocate(count)); },
            py::arg("count"))
        .def(
            "retain",
            [](PagePool& pool, const py::array& pages) {
                pool.retain(elements<PageId>(pages, "pages"));
            },
            py::arg("pages"))
        .def(
            "release",
            [](PagePool& pool, const py::array& pages) {
                return pool.release(elements<PageId>(pages, "pages"));
            },
            py::arg("pages"))
        .def("ref_count", &PagePool::ref_count, py::arg("page"))
        .def_property_readonly("num_pages", &PagePool::num_pages)
        .def_property_readonly("num_reserved", &PagePool::num_reserved)
        .def_property_readonly("num_free", &PagePool::num_free)
        .def_property_readonly("num_evictable", &PagePool::num_evictable);

    py::class_<PrefixMatch>(m, "PrefixMatch")
        .def_readonly("num_tokens", &PrefixMatch::num_tokens)
        .def_property_readonly("pages",
                               [](const PrefixMatch& match) { return numpy_array(match.pages); })
        .def_property_readonly("partial_page",
                               [](const PrefixMatch& match) {
                                   return match.partial_page < 0
                                              ? std::nullopt
                                              : std::optional<PageId>(match.partial_page);
                               })
        .def_readonly("lock", &PrefixMatch::lock);

    py::class_<NodeView>(m, "RadixTreeNode")
        .def_readonly("namespace", &NodeView::space)
        .def_readonly("parent", &NodeView::parent)
        .def_readonly("begin", &NodeView::begin)
        .def_readonly("keys", &NodeView::keys)
        .def_readonly("pages", &NodeView::pages)
        .def_readonly("num_locks", &NodeView::num_locks)
        .def_readonly("locked", &NodeView::locked)
        .def_readonly("last_access", &NodeView::last_access);

    py::class_<RadixTree>(m, "RadixTree")
        .def(py::init<std::shared_ptr<PagePool>, std::int64_t>(), py::arg("pool"),
             py::arg("page_size"))
        .def(
            "match",
            [](const RadixTree& tree, const std::string& space, const py::array& keys) {
                return tree.match(space, elements<Key>(keys, "keys"));
            },
            py::arg("namespace"), py::arg("keys"))
        .def(
            "lock",
            [](RadixTree& tree, const std::string& space, const py::array& keys) {
                return tree.lock(space, elements<Key>(keys, "keys"));
            },
            py::arg("namespace"), py::arg("keys"))
        .def("unlock", &RadixTree::unlock, py::arg("lock"))
        .def(
            "insert",
            [](RadixTree& tree, const std::string& space, const py::array& keys,
               const py::array& pages, std::optional<LockId> lock) {
                return tree.insert(space, elements<Key>(keys, "keys"),
                                   elements<PageId>(pages, "pages"), lock);
            },
            py::arg("namespace"), py::arg("keys"), py::arg("pages"), py::arg("lock") = py::none())
        .def("evict", &RadixTree::evict, py::arg("num_pages"))
        .def("clear", &RadixTree::clear, py::arg("namespace") = py::none())
        .def_property_readonly("page_size", &RadixTree::page_size)
        .def_property_readonly("num_tokens", &RadixTree::num_tokens)
        .def_property_readonly("num_pages", &RadixTree::num_pages)
        .def_property_readonly("num_locks", &RadixTree::num_locks)
        .def_property_readonly("num_namespaces", &RadixTree::num_namespaces)
        .def_property_readonly("num_evictable_pages", &RadixTree::num_evictable_pages)
        .def("nodes", &RadixTree::nodes);
}

}  // namespace sglite
