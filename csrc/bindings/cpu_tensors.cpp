// What an operator asks of every one of its tensors, asked in one call: in Python these questions take longer than a small
// kernel. Nothing of torch is needed but the attributes that a tensor shows to Python, and what exchange.h says.
#include <cmath>

#include "exchange.h"
#include "fedkern/distill.h"

namespace fedkern {
namespace {

// Names of attributes and methods, made once and never freed.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* itemsize = PyUnicode_InternFromString("itemsize");
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

bool is_one_of(PyObject* object, PyObject* types) {
  for (Py_ssize_t t = 0; t < PyTuple_GET_SIZE(types); ++t)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(types, t)) return true;
  return false;
}

// Whether a kernel may read `tensor`, a [size] or (matrix) [rows, size], through its address: exactly of one of `types`, on the
// CPU, strided, its last stride one, no negated view, not batched (those have no address), and asking for no gradient.
bool plain(PyObject* tensor, PyObject* types, bool grad, bool matrix, Plain& found) {
  TensorView seen;
  if (!is_one_of(tensor, types) || !view(tensor, seen) || !seen.on_cpu() || seen.dims != (matrix ? 2 : 1)) return false;
  if (seen.strides[seen.dims - 1] != 1 || (!seen.data && !seen.empty())) return false;
  if (result(tensor, names().is_neg).ptr() != Py_False) return false;
  if (grad && attribute(tensor, names().requires_grad).ptr() != Py_False) return false;
  found.dtype = attribute(tensor, names().dtype);
  found.data = reinterpret_cast<std::uintptr_t>(seen.data);
  found.size = seen.shape[seen.dims - 1];
  if (matrix) found.rows = seen.shape[0], found.step = seen.strides[0];
  return found.dtype && !PyErr_Occurred();
}

py::object no() {
  PyErr_Clear();  // the checks in Python say what is wrong
  return py::none();
}

// (dtype, size, addresses) of one matrix, or of a list or tuple of vectors of one dtype and size, that are all plain; else None.
py::object plain_vectors(py::handle vectors, py::handle types, bool grad) {
  Plain first;
  if (is_one_of(vectors.ptr(), types.ptr())) {
    if (!plain(vectors.ptr(), types.ptr(), grad, true, first) || !first.rows) return no();
    const py::object item = attribute(first.dtype.ptr(), names().itemsize);
    const std::size_t step = item ? static_cast<std::size_t>(first.step) * PyLong_AsSize_t(item.ptr()) : 0;
    py::list addresses(first.rows);
    for (Py_ssize_t m = 0; m < first.rows; ++m)
      PyList_SET_ITEM(addresses.ptr(), m, PyLong_FromSize_t(first.data + static_cast<std::size_t>(m) * step));
    return item ? py::make_tuple(first.dtype, first.size, addresses) : no();
  }
  if (!PyList_CheckExact(vectors.ptr()) && !PyTuple_CheckExact(vectors.ptr())) return py::none();
  // A tuple of its own: what is asked of a tensor may let other threads change the list.
  const py::tuple given = py::reinterpret_steal<py::tuple>(PySequence_Tuple(vectors.ptr()));
  const Py_ssize_t count = PyTuple_GET_SIZE(given.ptr());
  if (!count) return py::none();
  py::list addresses(count);
  for (Py_ssize_t m = 0; m < count; ++m) {
    Plain one;
    if (!plain(PyTuple_GET_ITEM(given.ptr(), m), types.ptr(), grad, false, one)) return no();
    if (m == 0) first = one;
    if (one.dtype.ptr() != first.dtype.ptr() || one.size != first.size) return py::none();
    PyList_SET_ITEM(addresses.ptr(), m, PyLong_FromSize_t(one.data));
  }
  return py::make_tuple(first.dtype, first.size, addresses);
}

// (the weights as floats, their sum, added up in order) of a list or tuple of `count` floats and ints that are finite and not
// negative and do not all vanish; else None.
py::object plain_weights(py::handle weights, Py_ssize_t count) {
  if (!PyList_CheckExact(weights.ptr()) && !PyTuple_CheckExact(weights.ptr())) return py::none();
  const py::tuple given = py::reinterpret_steal<py::tuple>(PySequence_Tuple(weights.ptr()));
  if (!given || PyTuple_GET_SIZE(given.ptr()) != count) return no();
  py::list values(count);
  double total = 0;
  for (Py_ssize_t m = 0; m < count; ++m) {
    PyObject* const item = PyTuple_GET_ITEM(given.ptr(), m);
    if (!PyFloat_CheckExact(item) && !PyLong_CheckExact(item)) return py::none();
    const double value = PyFloat_AsDouble(item);
    if (!(value >= 0)) return no();  // an int too large gives -1 and an error
    total += value;
    PyList_SET_ITEM(values.ptr(), m, PyFloat_FromDouble(value));
  }
  return total > 0 && std::isfinite(total) ? py::object(py::make_tuple(values, total)) : no();
}

// Whether `bytes` at `target` share nothing with any of the vectors, each of `each` bytes, but the whole of one where `whole`.
bool apart(std::uintptr_t target, std::size_t bytes, const py::list& addresses, std::size_t each, bool whole) {
  for (Py_ssize_t m = 0; m < PyList_GET_SIZE(addresses.ptr()); ++m) {
    const std::uintptr_t begin = PyLong_AsSize_t(PyList_GET_ITEM(addresses.ptr(), m));
    if (!(whole && begin == target) && begin < target + bytes && target < begin + each) return false;
  }
  return true;
}

// What follows answers for a call's tensors at once: kNo where something is unusual, which decides nothing (the checks in Python
// say whether it is wrong, or right but for another path); else where all of them are, the CPU or one GPU.
enum : int { kNo = 0, kOnCpu = TensorView::kCpu, kOnCuda = TensorView::kCuda };

// Whether a kernel may read `tensor` through its address: floating, no negated view, and with memory of its own, which
// neither batched ones have nor those that outlived a transform.
int readable(PyObject* tensor, TensorView& found) {
  DType dtype;
  if (!is_tensor(tensor)) return kNo;
  if (!view(tensor, found)) return PyErr_Clear(), kNo;
  if (found.device_type != TensorView::kCpu && found.device_type != TensorView::kCuda) return kNo;
  if (!found.floating(dtype) || (!found.data && !found.empty())) return kNo;
  return result(tensor, names().is_neg).ptr() == Py_False ? found.device_type : kNo;
}

// Whether kernels may read all of them.
int tensors_fit(const py::args& tensors) {
  TensorView first{}, one{};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!readable(PyTuple_GET_ITEM(tensors.ptr(), i), i ? one : first) || (i && !one.same_device(first))) return kNo;
  }
  return tensors.size() ? first.device_type : kNo;
}

// The same, and they are logits of one shape: [B, C, *positions], C > 0.
int logits_fit(const py::args& tensors) {
  TensorView first{}, one{};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!readable(PyTuple_GET_ITEM(tensors.ptr(), i), i ? one : first)) return kNo;
    if (i && !(one.same_device(first) && one.same_shape(first))) return kNo;
  }
  const bool logits = tensors.size() && first.dims >= 2 && first.dims <= kMaxRowDims + 1 && first.shape[1];
  return logits ? first.device_type : kNo;
}

// Whether blend's kernel may read what it is given, and all of it fits together.
int blend_fits(py::handle foreground, py::handle background, py::handle alpha, py::handle index) {
  TensorView front, back, weights, chosen;
  if (!readable(foreground.ptr(), front) || !readable(background.ptr(), back) || !front.dims) return kNo;
  if (front.code != back.code || front.bits != back.bits || !front.same_device(back)) return kNo;
  if (PyFloat_CheckExact(alpha.ptr())) {
    const double value = PyFloat_AS_DOUBLE(alpha.ptr());
    if (!(value >= 0 && value <= 1)) return kNo;
  } else if (!readable(alpha.ptr(), weights) || weights.dims != 1 || weights.shape[0] != front.shape[0] ||
             !weights.same_device(front)) {
    return kNo;
  }
  if (index.is_none()) return back.same_shape(front) ? front.device_type : kNo;
  if (!is_tensor(index.ptr())) return kNo;
  if (!view(index.ptr(), chosen)) return PyErr_Clear(), kNo;
  const bool counts = chosen.same_device(front) && chosen.code == 0 && chosen.bits == 64 && chosen.dims == 1;
  return counts && chosen.shape[0] == front.shape[0] && back.same_shape(front, 1) ? front.device_type : kNo;
}

// How the fuse kernels may read maps of one dtype and shape, with scale and shift [maps * channels] of the dtype computed in:
// 1 contiguous, 2 channels-last, 0 not so.
int fuse_fits(py::handle features, py::handle scale, py::handle shift) {
  if (!PyList_CheckExact(features.ptr()) && !PyTuple_CheckExact(features.ptr())) return 0;
  const py::tuple given = py::reinterpret_steal<py::tuple>(PySequence_Tuple(features.ptr()));  // as in plain_vectors
  const Py_ssize_t count = PyTuple_GET_SIZE(given.ptr());
  TensorView first{}, one{};
  int layout = 0;
  for (Py_ssize_t m = 0; m < count; ++m) {
    if (readable(PyTuple_GET_ITEM(given.ptr(), m), one) != kOnCpu) return 0;
    if (m == 0) {
      if (one.dims < 2 || one.empty()) return 0;
      first = one, layout = one.contiguous() ? 1 : one.channels_last() ? 2 : 0;
    }
    if (one.code != first.code || one.bits != first.bits || !one.same_shape(first)) return 0;
    if (!(layout == 1 ? one.contiguous() : layout == 2 && one.channels_last())) return 0;
  }
  for (const py::handle vector : {scale, shift}) {
    if (vector.is_none() || !count) continue;
    if (readable(vector.ptr(), one) != kOnCpu || one.code != 2 || one.bits != (first.bits == 64 ? 64 : 32)) return 0;
    if (one.dims != 1 || one.shape[0] != first.shape[1] * count || !one.contiguous()) return 0;
  }
  return layout;
}

}  // namespace

void bind_tensors(py::module_& module) {
  module.def("take_tensors", take_tensors);
  module.def("tensors_fit", tensors_fit);
  module.def("logits_fit", logits_fit);
  module.def("blend_fits", blend_fits);
  module.def("fuse_fits", fuse_fits);
  module.def("plain_vectors", plain_vectors);
  module.def("plain_weights", plain_weights);
  module.def("apart", apart);
}

}  // namespace fedkern
