// Whether what was gathered of Python objects still lies where it was found.
//
// Every decode step asks this of every layer, hundreds of lookups after its weights have emptied
// the caches: in the interpreter they would take longer than a step of a small model.
#include <pybind11/pybind11.h>

#include "python/bindings.h"

namespace py = pybind11;

namespace sglite {

static PyObject* at(const py::tuple& items, size_t index) {
    return PyTuple_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(index));
}

static void check_lengths(const char* name, const py::tuple& one, const py::tuple& other) {
    if (one.size() != other.size()) {
        throw py::value_error(std::string("is_unchanged: ") + name + ": expected tuples of " +
                              "one length, got " + std::to_string(one.size()) + " and " +
                              std::to_string(other.size()));
    }
}

static PyObject* table_at(const py::tuple& tables, size_t index) {
    PyObject* table = at(tables, index);
    if (!PyDict_Check(table)) throw py::type_error("is_unchanged: expected dictionaries");
    return table;
}

// How many objects ahead of the one looked at memory is asked for: each comes from there, and
// waiting for one after the other is nearly all that the check takes.
constexpr size_t kAhead = 12;

static void prefetch_object(const py::tuple& objects, size_t index) {
    if (index < objects.size()) __builtin_prefetch(at(objects, index));
}

// What a look into the table needs, once the table itself is there.
static void prefetch_contents(const py::tuple& tables, size_t index) {
    if (index >= tables.size()) return;
    const auto* table = reinterpret_cast<PyDictObject*>(table_at(tables, index));
    for (const char* part : {reinterpret_cast<const char*>(table->ma_keys),
                             reinterpret_cast<const char*>(table->ma_values)}) {
        __builtin_prefetch(part);  // of null it does nothing
        __builtin_prefetch(part + 64);
    }
}

void bind_snapshot(py::module_& m) {
    // all(table.get(key, absent) is value), all(type(object) is kind), and not any(empty)
    m.def(
        "is_unchanged",
        [](const py::tuple& tables, const py::tuple& keys, const py::tuple& values,
           const py::object& absent, const py::tuple& objects, const py::tuple& kinds,
           const py::tuple& empty) {
            check_lengths("keys", tables, keys);
            check_lengths("values", tables, values);
            check_lengths("kinds", objects, kinds);
            for (size_t i = 0; i < tables.size(); ++i) {
                prefetch_object(tables, i + 2 * kAhead);
                prefetch_contents(tables, i + kAhead);
                PyObject* found = PyDict_GetItemWithError(table_at(tables, i), at(keys, i));
                if (!found && PyErr_Occurred()) throw py::error_already_set();
                if ((found ? found : absent.ptr()) != at(values, i)) return false;
            }
            for (size_t i = 0; i < objects.size(); ++i) {
                prefetch_object(objects, i + kAhead);
                if (reinterpret_cast<PyObject*>(Py_TYPE(at(objects, i))) != at(kinds, i)) {
                    return false;
                }
            }
            for (size_t i = 0; i < empty.size(); ++i) {
                prefetch_object(empty, i + kAhead);
                if (PyDict_Size(table_at(empty, i)) != 0) return false;
            }
            return true;
        },
        py::arg("tables"), py::arg("keys"), py::arg("values"), py::arg("absent"),
        py::arg("objects"), py::arg("kinds"), py::arg("empty"));
}

}  // namespace sglite
