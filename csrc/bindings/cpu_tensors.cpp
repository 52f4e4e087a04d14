// What an operator asks of every one of its tensors, asked in one call: in Python these questions take longer than a small
// kernel. Nothing of torch is needed but the attributes that a tensor shows to Python, and what exchange.h says.
#include <limits>

#include "conv_call.h"
#include "exchange.h"
#include "fedkern/distill.h"
#include "optimise_call.h"
#include "strided_call.h"

namespace fedkern {
namespace {

// Names of attributes and methods, made once and never freed.
struct Names {
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
};

const Names& names() {
  static const Names all;
  return all;
}

py::object attribute(PyObject* tensor, PyObject* name) { return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name)); }

py::object result(PyObject* tensor, PyObject* method) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
}

// What follows answers for a call's tensors at once: kNo where something is unusual, which decides nothing (the checks in Python
// say whether it is wrong, or right but for another path); else where all of them are, TensorView::kCpu or kCuda.
constexpr int kNo = 0;

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

// Whether boxes' kernels may read contiguous images [B, C, H, W] and boxes [B, n, 4], with one number for all that is replaced.
int boxes_fit(py::handle images, py::handle boxes, py::handle fill) {
  TensorView pictures, corners;
  if (!PyFloat_CheckExact(fill.ptr()) || !readable(images.ptr(), pictures) || !readable(boxes.ptr(), corners)) return kNo;
  if (pictures.dims != 4 || !pictures.contiguous() || !pictures.same_device(corners)) return kNo;
  const bool boxed = corners.dims == 3 && corners.shape[0] == pictures.shape[0] && corners.shape[2] == 4;
  return boxed ? pictures.device_type : kNo;
}

// Whether the fuse kernels may read maps of one dtype and shape, all contiguous or all channels-last, with scale and shift
// [maps * channels] of the dtype computed in.
int fuse_fits(py::handle features, py::handle scale, py::handle shift) {
  if (!PyList_CheckExact(features.ptr()) && !PyTuple_CheckExact(features.ptr())) return kNo;
  const py::tuple given = py::reinterpret_steal<py::tuple>(PySequence_Tuple(features.ptr()));  // as in vectors_fit
  const Py_ssize_t count = PyTuple_GET_SIZE(given.ptr());
  if (!count) return kNo;
  TensorView first{}, one{};
  bool planar = false;
  for (Py_ssize_t m = 0; m < count; ++m) {
    if (!readable(PyTuple_GET_ITEM(given.ptr(), m), one)) return kNo;
    if (m == 0) {
      if (one.dims < 2 || one.empty()) return kNo;
      first = one, planar = one.contiguous();
    }
    if (one.code != first.code || one.bits != first.bits || !one.same_shape(first) || !one.same_device(first)) return kNo;
    if (!(planar ? one.contiguous() : one.channels_last())) return kNo;
  }
  for (const py::handle vector : {scale, shift}) {
    if (vector.is_none()) continue;
    if (!readable(vector.ptr(), one) || !one.same_device(first) || one.code != 2 || one.bits != (first.bits == 64 ? 64 : 32)) return kNo;
    if (one.dims != 1 || one.shape[0] != first.shape[1] * count || !one.contiguous()) return kNo;
  }
  return first.device_type;
}

// An int; -1 for any other object, and for one that no long holds.
long whole_number(py::handle given) {
  int overflow = 0;
  return PyLong_CheckExact(given.ptr()) ? PyLong_AsLongAndOverflow(given.ptr(), &overflow) : -1;
}

// Whether conv's kernel may take a call as it is given, and is the faster way. Where only one of x and weight is channels-last,
// x is laid out anew; where neither is, so is not what PyTorch gives. A weight of one tap counts as neither.
int conv_fits(py::handle x, py::handle weight, py::handle scale, py::handle shift, py::handle mean, py::handle variance, py::handle residual, py::handle pool, py::handle stride,
              py::handle groups, py::handle bias) {
  TensorView map, taps, one;
  if (!readable(x.ptr(), map) || !readable(weight.ptr(), taps)) return kNo;
  const long halved = whole_number(pool), parts = whole_number(groups);
  const ConvShape s = conv_shape(map, taps, whole_number(stride)), r = s.result();
  if (r.positions() < 2 || (halved != 1 && halved != 2) || !kept_channels(s, parts)) return kNo;  // one value has no variance
  if (!map.channels_last() && (s.kernel == 1 || !taps.channels_last())) return kNo;
  if (halved == 2 && (r.height < 2 || r.width < 2)) return kNo;
  const auto counts = [&](py::handle vector) { return readable(vector.ptr(), one) && is_vector(one, s.out); };
  if (!counts(scale) || !counts(shift)) return kNo;
  if (mean.is_none() ? !variance.is_none() : parts || !counts(mean) || !counts(variance)) return kNo;
  if (!bias.is_none() && (!parts || !counts(bias))) return kNo;
  if (residual.is_none()) return TensorView::kCpu;
  return halved == 1 && readable(residual.ptr(), one) && is_map(one, r, s.out, false) ? TensorView::kCpu : kNo;
}

// The same of conv_pool's kernel.
int pool_fits(py::handle x, py::handle weight, py::handle bias, py::handle padding) {
  TensorView map, taps, one;
  const auto fits = conv_kernels().pool_fits;
  if (!fits || !readable(x.ptr(), map) || !readable(weight.ptr(), taps)) return kNo;
  const PoolShape s = pool_shape(map, taps, whole_number(padding));
  if (!fits(s)) return kNo;
  return bias.is_none() || (readable(bias.ptr(), one) && is_vector(one, s.out)) ? TensorView::kCpu : kNo;
}

// The same of strided_conv's kernel, of whose groups threads share the work.
int strided_fits(py::handle x, py::handle weight, py::handle groups) {
  TensorView map, taps;
  const auto fits = strided_kernels().fits;
  if (!fits || !readable(x.ptr(), map) || !readable(weight.ptr(), taps)) return kNo;
  return fits(strided_shape(map, taps, whole_number(groups))) ? TensorView::kCpu : kNo;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A float or an int of [low, high).
bool number(PyObject* given, double low, double high) {
  if (!PyFloat_CheckExact(given) && !PyLong_CheckExact(given)) return false;
  const double value = PyFloat_AsDouble(given);
  if (value == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  return value >= low && value < high;
}

// What the vectors of a step of optimise have in common, and where each lies.
struct Vectors {
  bool recorded = false;  // autograd is on
  TensorView first{};
  std::int64_t rows = 1, size = 0;
  struct Span {
    std::uintptr_t begin;
    std::size_t step, bytes;  // from row to row, of a row
    bool written;
  };
  Span spans[7];
  int count = 0;

  // Whether the kernel may take `tensor` ([size] or [rows, size]; what is only read may be [size] for all rows), or it is None.
  bool take(PyObject* tensor, bool written) {
    TensorView seen;
    if (tensor == Py_None) return true;
    if (!readable(tensor, seen)) return false;
    if (recorded && attribute(tensor, names().requires_grad).ptr() != Py_False) return PyErr_Clear(), false;
    if (!count) {
      if (seen.dims != 1 && seen.dims != 2) return false;
      first = seen, size = seen.shape[seen.dims - 1], rows = seen.dims == 2 ? seen.shape[0] : 1;
    }
    const bool shared = !written && seen.dims == 1 && first.dims == 2;
    if (seen.code != first.code || seen.bits != first.bits || !seen.same_device(first)) return false;
    if ((seen.dims != first.dims && !shared) || seen.shape[seen.dims - 1] != size) return false;
    if (seen.dims == 2 && seen.shape[0] != rows) return false;
    if (size > 1 && seen.strides[seen.dims - 1] != 1) return false;
    const std::int64_t step = seen.dims == 2 && rows > 1 ? seen.strides[0] : 0;
    if (written && rows > 1 && step < size) return false;
    const std::size_t bytes = seen.bits / 8;
    spans[count++] = {reinterpret_cast<std::uintptr_t>(seen.data), static_cast<std::size_t>(step) * bytes, static_cast<std::size_t>(size) * bytes, written};
    return true;
  }

  // Whether two may share memory, of which one is written to.
  bool shared(const Span& a, const Span& b) const {
    const std::size_t all = static_cast<std::size_t>(rows - 1);
    if (a.begin >= b.begin + all * b.step + b.bytes || b.begin >= a.begin + all * a.step + a.bytes) return false;
    // Columns of one matrix.
    if (a.step == b.step && a.step && a.bytes <= a.step) {
      const std::size_t apart = (b.begin >= a.begin ? b.begin - a.begin : a.step - (a.begin - b.begin) % a.step) % a.step;
      return apart < a.bytes || a.step - apart < b.bytes;
    }
    return true;
  }
  bool overlap() const {
    if (!size || !rows) return false;
    for (int i = 0; i < count; ++i)
      for (int j = i + 1; j < count; ++j)
        if ((spans[i].written || spans[j].written) && shared(spans[i], spans[j])) return true;
    return false;
  }
};

// Whether `given` is a number, or for parameters of two axes a list or tuple of one for each row.
bool are_rates(PyObject* given, const Vectors& vectors) {
  if (number(given, 0, kInfinity)) return true;
  if (vectors.first.dims != 2 || (!PyList_CheckExact(given) && !PyTuple_CheckExact(given))) return false;
  if (PySequence_Fast_GET_SIZE(given) != vectors.rows) return false;
  for (std::int64_t m = 0; m < vectors.rows; ++m)
    if (!number(PySequence_Fast_GET_ITEM(given, m), 0, kInfinity)) return false;
  return true;
}

// Whether optimise's kernel may take a step (optimise_call.h) as it is given, and nothing about it is wrong. recorded: autograd is on.
int optimise_fits(const py::tuple& call, bool recorded) {
  if (!is_optimise_call(call)) return kNo;
  const auto given = [&](OptimiseField name) { return field(call, name) != Py_None; };
  const auto positive = [&](OptimiseField name) { return number(field(call, name), 0, kInfinity); };
  if (!PyBool_Check(field(call, kZero)) || !given(kParameters) || !given(kGradients)) return kNo;
  const bool zero = field(call, kZero) == Py_True;
  Vectors vectors;
  vectors.recorded = recorded;
  if (!vectors.take(field(call, kParameters), true) || !vectors.take(field(call, kGradients), zero)) return kNo;
  // Gradients are one's own.
  if (vectors.first.dims == 2 && vectors.rows > 1 && !vectors.spans[1].step && vectors.size) return kNo;
  if (!vectors.take(field(call, kFirst), true) || !vectors.take(field(call, kSecond), true)) return kNo;
  if (!vectors.take(field(call, kAnchor), false) || !vectors.take(field(call, kCorrection), false)) return kNo;
  if (!vectors.take(field(call, kGradientSum), true)) return kNo;
  if (!positive(kMomentum) || !positive(kWeightDecay) || !positive(kProximal)) return kNo;
  if (given(kAdamW)) {
    PyObject* const adamw = field(call, kAdamW);
    const double below[kAdamWNumbers] = {1, 1, 2, 2, kInfinity};
    for (Py_ssize_t i = 0; i < kAdamWNumbers; ++i)
      if (!number(PyTuple_GET_ITEM(adamw, i), 0, below[i])) return kNo;
    if (!given(kFirst) || !given(kSecond)) return kNo;
  } else if (given(kSecond) || (PyFloat_AsDouble(field(call, kMomentum)) != 0) != given(kFirst)) {
    return kNo;
  }
  if (PyFloat_AsDouble(field(call, kProximal)) != 0 && !given(kAnchor)) return kNo;
  if (given(kMaxNorm) && (!positive(kMaxNorm) || PyFloat_AsDouble(field(call, kMaxNorm)) == 0)) return kNo;
  return are_rates(field(call, kRate), vectors) && !vectors.overlap() ? vectors.first.device_type : kNo;
}

// Whether aggregate's kernels may read `vectors` as they are: a matrix [M, P], or a list or tuple of vectors [P] of one dtype, size and
// device, of unit stride, M > 0. Each of `others` is None or must be such a vector [P] too, of any dtype. recorded: autograd is on, so
// none may ask for a gradient.
int vectors_fit(py::handle vectors, bool recorded, const py::args& others) {
  TensorView first{}, one{};
  const auto fits = [&](PyObject* tensor, int dims, TensorView& found) {
    if (!readable(tensor, found) || found.dims != dims || found.strides[dims - 1] != 1) return false;
    return !recorded || attribute(tensor, names().requires_grad).ptr() == Py_False;
  };
  py::object given;
  if (is_tensor(vectors.ptr())) {
    if (!fits(vectors.ptr(), 2, first) || !first.shape[0]) return kNo;
  } else {
    if (!PyList_CheckExact(vectors.ptr()) && !PyTuple_CheckExact(vectors.ptr())) return kNo;
    // A tuple of its own: what is asked of a tensor may let other threads change the list.
    given = py::reinterpret_steal<py::object>(PySequence_Tuple(vectors.ptr()));
    const Py_ssize_t count = PyTuple_GET_SIZE(given.ptr());
    if (!count) return kNo;
    for (Py_ssize_t m = 0; m < count; ++m) {
      if (!fits(PyTuple_GET_ITEM(given.ptr(), m), 1, m ? one : first)) return kNo;
      if (m && (one.code != first.code || one.bits != first.bits || one.shape[0] != first.shape[0] || !one.same_device(first))) return kNo;
    }
  }
  const std::int64_t size = first.shape[first.dims - 1];
  for (const py::handle other : others) {
    if (other.is_none()) continue;
    if (!fits(other.ptr(), 1, one) || one.shape[0] != size || !one.same_device(first)) return kNo;
  }
  return first.device_type;
}

}  // namespace

void bind_tensors(py::module_& module) {
  module.def("take_tensors", take_tensors);
  module.def("tensors_fit", tensors_fit);
  module.def("logits_fit", logits_fit);
  module.def("blend_fits", blend_fits);
  module.def("boxes_fit", boxes_fit);
  module.def("fuse_fits", fuse_fits);
  module.def("conv_fits", conv_fits);
  module.def("pool_fits", pool_fits);
  module.def("strided_fits", strided_fits);
  module.def("optimise_fits", optimise_fits);
  module.def("vectors_fit", vectors_fit);
}

}  // namespace fedkern
