// What an operator asks of every one of its vectors, asked in one call: in Python these questions take longer than a small
// kernel. Nothing of torch is needed but the attributes that a tensor shows to Python.
#include "bindings.h"

namespace fedkern {
namespace {

// Names of attributes and methods, made once and never freed.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* numel = PyUnicode_InternFromString("numel");
  PyObject* itemsize = PyUnicode_InternFromString("itemsize");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
};

const Names& names() {
  static const Names all;
  return all;
}

py::object attribute(PyObject* tensor, PyObject* name) { return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name)); }

py::object result(PyObject* tensor, PyObject* method) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
}

struct Plain {
  py::object dtype;
  Py_ssize_t rows = 1, size = 0, step = 0;  // step: elements from row to row
  std::uintptr_t data = 0;
};

bool is_tensor(PyObject* object, PyObject* types) {
  for (Py_ssize_t t = 0; t < PyTuple_GET_SIZE(types); ++t)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(types, t)) return true;
  return false;
}

// Whether a kernel may read `tensor`, a [size] or (matrix) [rows, size], through its address: exactly of one of `types`, on the
// CPU, strided, its last stride one, no negated view, not batched (those have no address), and asking for no gradient.
bool plain(PyObject* tensor, PyObject* types, bool grad, bool matrix, Plain& found) {
  if (!is_tensor(tensor, types) || attribute(tensor, names().is_cpu).ptr() != Py_True) return false;
  if (result(tensor, names().is_neg).ptr() != Py_False) return false;
  if (grad && attribute(tensor, names().requires_grad).ptr() != Py_False) return false;
  const py::object stride = result(tensor, names().stride);
  const Py_ssize_t dims = matrix ? 2 : 1;
  if (!stride || !PyTuple_Check(stride.ptr()) || PyTuple_GET_SIZE(stride.ptr()) != dims) return false;
  if (PyLong_AsSsize_t(PyTuple_GET_ITEM(stride.ptr(), dims - 1)) != 1) return false;
  const py::object data = result(tensor, names().data_ptr);
  if (!data) return false;
  found.dtype = attribute(tensor, names().dtype);
  found.data = PyLong_AsSize_t(data.ptr());
  if (matrix) {
    const py::object shape = attribute(tensor, names().shape);
    if (!shape || PyTuple_GET_SIZE(shape.ptr()) != 2) return false;
    found.rows = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), 0)), found.size = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), 1));
    found.step = PyLong_AsSsize_t(PyTuple_GET_ITEM(stride.ptr(), 0));
  } else {
    const py::object size = result(tensor, names().numel);
    if (!size) return false;
    found.size = PyLong_AsSsize_t(size.ptr());
  }
  return found.dtype && !PyErr_Occurred();
}

py::object no() {
  PyErr_Clear();  // the checks in Python say what is wrong
  return py::none();
}

// (dtype, size, addresses) of one matrix, or of a list or tuple of vectors of one dtype and size, that are all plain; else None.
py::object plain_vectors(py::handle vectors, py::handle types, bool grad) {
  Plain first;
  if (is_tensor(vectors.ptr(), types.ptr())) {
    if (!plain(vectors.ptr(), types.ptr(), grad, true, first) || !first.rows) return no();
    const py::object item = attribute(first.dtype.ptr(), names().itemsize);
    const std::size_t step = item ? static_cast<std::size_t>(first.step) * PyLong_AsSize_t(item.ptr()) : 0;
    py::list addresses(first.rows);
    for (Py_ssize_t m = 0; m < first.rows; ++m)
      PyList_SET_ITEM(addresses.ptr(), m, PyLong_FromSize_t(first.data + static_cast<std::size_t>(m) * step));
    return item ? py::make_tuple(first.dtype, first.size, addresses) : no();
  }
  if (!PyList_CheckExact(vectors.ptr()) && !PyTuple_CheckExact(vectors.ptr())) return py::none();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(vectors.ptr());
  if (!count) return py::none();
  py::list addresses(count);
  for (Py_ssize_t m = 0; m < count; ++m) {
    Plain one;
    if (!plain(PySequence_Fast_GET_ITEM(vectors.ptr(), m), types.ptr(), grad, false, one)) return no();
    if (m == 0) first = one;
    if (one.dtype.ptr() != first.dtype.ptr() || one.size != first.size) return py::none();
    PyList_SET_ITEM(addresses.ptr(), m, PyLong_FromSize_t(one.data));
  }
  return py::make_tuple(first.dtype, first.size, addresses);
}

// Whether `bytes` at `target` share nothing with any of the vectors, each of `each` bytes, but the whole of one where `whole`.
bool apart(std::uintptr_t target, std::size_t bytes, const py::list& addresses, std::size_t each, bool whole) {
  for (Py_ssize_t m = 0; m < PyList_GET_SIZE(addresses.ptr()); ++m) {
    const std::uintptr_t begin = PyLong_AsSize_t(PyList_GET_ITEM(addresses.ptr(), m));
    if (!(whole && begin == target) && begin < target + bytes && target < begin + each) return false;
  }
  return true;
}

}  // namespace

void bind_tensors(py::module_& module) {
  module.def("plain_vectors", plain_vectors);
  module.def("apart", apart);
}

}  // namespace fedkern
