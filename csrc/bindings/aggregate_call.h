// Arguments of the aggregate cores as Python passes them. fedkern.ops has checked them, but another thread may have changed a
// list since then: what the kernels rely on is asked again.
#pragma once

#include <cmath>
#include <stdexcept>
#include <vector>

#include "exchange.h"
#include "fedkern/aggregate.h"

namespace fedkern {

inline TensorView vector_view(PyObject* tensor, DType& dtype) {
  const TensorView seen = checked_view(tensor);
  if (seen.dims != 1 || !seen.floating(dtype)) throw py::type_error("fedkern's aggregate kernels take floating vectors");
  return seen;
}

// Elements between neighbours; 1 where there are none.
inline std::int64_t stride_of(const TensorView& seen) {
  return seen.shape[seen.dims - 1] > 1 ? seen.strides[seen.dims - 1] : 1;
}

// M vectors [P]: the rows of a matrix [M, P], or a list or tuple of tensors, which live as long as this.
struct VectorList {
  py::object kept;
  DType dtype{};
  int gpu = 0;
  std::int64_t count = 0, size = 0;
  std::vector<const void*> data;
  std::vector<std::int64_t> strides;  // in elements
  bool matrix = false, alike = true;  // alike: of one stride
  std::int64_t row_stride = 0;        // of a matrix

  bool unit() const { return alike && strides[0] == 1; }
};

inline VectorList vectors_of(py::handle given) {
  VectorList x;
  const auto add = [&](const void* data, std::int64_t stride) {
    x.data.push_back(data), x.strides.push_back(stride);
    x.alike = x.alike && stride == x.strides[0];
  };
  auto* const tensor = reinterpret_cast<PyTypeObject*>(exchange().tensor);
  if (tensor && PyObject_TypeCheck(given.ptr(), tensor)) {
    const TensorView all = checked_view(given.ptr());
    if (all.dims != 2 || !all.shape[0] || !all.floating(x.dtype)) throw py::type_error("fedkern's aggregate kernels take a floating matrix of vectors");
    x.kept = py::reinterpret_borrow<py::object>(given);
    x.matrix = true, x.gpu = all.gpu(), x.count = all.shape[0], x.size = all.shape[1], x.row_stride = all.strides[0];
    x.data.reserve(static_cast<std::size_t>(x.count)), x.strides.reserve(static_cast<std::size_t>(x.count));
    const std::int64_t step = x.size ? x.row_stride * static_cast<std::int64_t>(item_size(x.dtype)) : 0;
    for (std::int64_t m = 0; m < x.count; ++m) add(static_cast<const char*>(all.data) + m * step, stride_of(all));
    return x;
  }
  x.kept = py::reinterpret_steal<py::object>(PySequence_Tuple(given.ptr()));
  if (!x.kept) throw py::error_already_set();
  x.count = PyTuple_GET_SIZE(x.kept.ptr());
  if (!x.count) throw std::invalid_argument("fedkern's aggregate kernels take at least one vector");
  x.data.reserve(static_cast<std::size_t>(x.count)), x.strides.reserve(static_cast<std::size_t>(x.count));
  TensorView first{};
  for (std::int64_t m = 0; m < x.count; ++m) {
    DType dtype;
    const TensorView one = vector_view(PyTuple_GET_ITEM(x.kept.ptr(), m), dtype);
    if (m == 0) first = one, x.dtype = dtype, x.size = one.shape[0], x.gpu = one.gpu();
    if (dtype != x.dtype || one.shape[0] != x.size || !one.same_device(first))
      throw std::invalid_argument("vectors differ in dtype, size or device");
    add(one.data, stride_of(one));
  }
  return x;
}

// One weight each, and their sum, added up in order.
struct WeightList {
  std::vector<double> numbers;
  double total = 0;
};

// A tensor's elements where it lies without gaps, and is as large as it must be.
inline TensorView dense(py::handle tensor, std::int64_t elements) {
  const TensorView seen = checked_view(tensor.ptr());
  std::int64_t all = 1;
  for (int d = 0; d < seen.dims; ++d) all *= seen.shape[d];
  if (all != elements || !seen.contiguous()) throw py::type_error("fedkern's aggregate kernels take contiguous tensors of the vectors' size");
  return seen;
}

// Any floating tensor.
struct Values {
  void* data = nullptr;
  DType dtype{};
};
inline Values values_of(py::handle tensor, std::int64_t elements) {
  const TensorView seen = dense(tensor, elements);
  Values result{seen.data};
  if (!seen.floating(result.dtype)) throw py::type_error("fedkern's aggregate kernels take floating tensors");
  return result;
}

inline double* doubles_of(py::handle tensor, std::int64_t elements) {
  const Values found = values_of(tensor, elements);
  if (found.dtype != DType::f64) throw py::type_error("fedkern's aggregate kernels take workspaces and sums in float64");
  return static_cast<double*>(found.data);
}

// A tensor or None.
inline Optional<double> optional_doubles(py::handle tensor, std::int64_t elements) {
  if (tensor.is_none()) return {};
  return {doubles_of(tensor, elements), true};
}

// `count` floats or ints in a list or tuple.
inline WeightList numbers_of(py::handle weights, std::int64_t count) {
  if (!PyList_CheckExact(weights.ptr()) && !PyTuple_CheckExact(weights.ptr()))
    throw py::type_error("fedkern's aggregate kernels take weights in a list, or for a GPU in a tensor");
  if (PySequence_Fast_GET_SIZE(weights.ptr()) != count) throw std::invalid_argument("weights and vectors differ in number");
  WeightList result;
  result.numbers.reserve(static_cast<std::size_t>(count));
  for (std::int64_t m = 0; m < count; ++m) {
    PyObject* const item = PySequence_Fast_GET_ITEM(weights.ptr(), m);
    if (!PyFloat_CheckExact(item) && !PyLong_CheckExact(item)) throw py::type_error("fedkern's aggregate kernels take weights as numbers");
    result.numbers.push_back(PyFloat_AsDouble(item));
    result.total += result.numbers.back();
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return result;
}

// digits: int64 [3, P], high first; top: int8 [P].
inline ExactState exact_state(py::handle digits, py::handle top, std::int64_t size) {
  const TensorView all = dense(digits, 3 * size), tops = dense(top, size);
  if (all.code || all.bits != 64 || tops.code || tops.bits != 8) throw py::type_error("digits must be int64 and their places int8");
  auto* const first = static_cast<std::int64_t*>(all.data);
  return {first, first + size, first + 2 * size, static_cast<std::int8_t*>(tops.data)};
}

// Results in the vectors' dtype: [rows * P].
inline void* alike_of(py::handle out, const VectorList& x, std::int64_t rows) {
  const Values to = values_of(out, rows * x.size);
  if (to.dtype != x.dtype) throw py::type_error("fedkern's aggregate kernels take results of the vectors' dtype");
  return to.data;
}

// What server_step reads and writes beside the vectors. The states (None where the rule has none) have one dtype.
struct ServerTensors {
  const void* global;
  Optional<void> first{}, second{};
  DType state = DType::f32;
  Values out;

  // Rules by number, as in rules.py: the mean has no state, momentum one, the others two.
  ServerTensors(const VectorList& x, int rule, py::handle global_, py::handle first_, py::handle second_, py::handle out_)
      : out(values_of(out_, x.size)) {
    DType dtype;
    for (const py::handle vector : {global_, first_, second_})
      if (!vector.is_none()) vector_view(vector.ptr(), dtype);
    require(rule >= 0 && rule <= 4, "rule must be one of fedkern/ops/_aggregate/rules.py");
    require(first_.is_none() == (rule == 0) && second_.is_none() == (rule < 2), "the rule's states are missing, or too many");
    const Values old = values_of(global_, x.size);
    if (old.dtype != x.dtype) throw py::type_error("the global model has the vectors' dtype");
    global = old.data;
    if (!first_.is_none()) {
      const Values found = values_of(first_, x.size);
      first = {found.data, true}, state = found.dtype;
    }
    if (second_.is_none()) return;
    const Values found = values_of(second_, x.size);
    if (first_.is_none() || found.dtype != state) throw py::type_error("both states have one dtype");
    second = {found.data, true};
  }
};

// What sorted_mean takes of M sorted values: those from `low` to below `high`, or all for a weighted median.
inline void check_sorted(const VectorList& x, std::int64_t low, std::int64_t high, bool weighted, bool median) {
  require(low >= 0 && low < high && high <= x.count, "sorted_mean takes the values from low to below high of as many as there are vectors");
  require(!median || (weighted && low == 0 && high == x.count), "a weighted median takes weights and all values");
}

// What follows spares fast calls the same questions in Python. Both cores export it.

// The weights as floats, of a list or tuple of `count` floats and ints that are finite and not negative and do not all vanish;
// else None.
inline py::object plain_weights(py::handle weights, Py_ssize_t count) {
  if (!PyList_CheckExact(weights.ptr()) && !PyTuple_CheckExact(weights.ptr())) return py::none();
  if (PySequence_Fast_GET_SIZE(weights.ptr()) != count) return py::none();
  py::list values(count);
  double total = 0;
  for (Py_ssize_t m = 0; m < count; ++m) {
    PyObject* const item = PySequence_Fast_GET_ITEM(weights.ptr(), m);
    if (!PyFloat_CheckExact(item) && !PyLong_CheckExact(item)) return py::none();
    const double value = PyFloat_AsDouble(item);
    if (!(value >= 0)) return PyErr_Clear(), py::none();  // an int too large gives -1 and an error
    total += value;
    PyList_SET_ITEM(values.ptr(), m, PyFloat_FromDouble(value));
  }
  return total > 0 && std::isfinite(total) ? py::object(values) : py::none();
}

// Whether a kernel may write to `written` (tensors [P] or None) while it reads `read` and `replaced` (vectors [P]): they have unit
// stride and share no memory with one another or the rest. But the last one may be one of `replaced`: it is written to element by
// element.
inline bool writable(const py::tuple& written, py::handle read, py::handle replaced) {
  struct Span {
    const char *begin, *end;
    DType dtype;
    std::int64_t stride;
    bool shares(const Span& other) const { return begin < other.end && other.begin < end; }
  };
  const auto span = [](const void* data, std::int64_t size, std::int64_t stride, DType dtype) -> Span {
    const auto* const begin = static_cast<const char*>(data);
    return {begin, begin + (size ? ((size - 1) * stride + 1) * static_cast<std::int64_t>(item_size(dtype)) : 0), dtype, stride};
  };
  std::vector<Span> targets;
  for (const py::handle tensor : written) {
    if (tensor.is_none()) continue;
    DType dtype;
    const TensorView seen = vector_view(tensor.ptr(), dtype);
    const Span target = span(seen.data, seen.shape[0], stride_of(seen), dtype);
    if (target.stride != 1) return false;
    for (const Span& other : targets)
      if (target.shares(other)) return false;
    targets.push_back(target);
  }
  if (targets.empty()) return true;
  const py::handle last = written[written.size() - 1];
  for (const py::handle vectors : {read, replaced}) {
    if (PyTuple_CheckExact(vectors.ptr()) && !PyTuple_GET_SIZE(vectors.ptr())) continue;
    const VectorList x = vectors_of(vectors);
    for (std::size_t m = 0; m < x.data.size(); ++m) {
      const Span own = span(x.data[m], x.size, x.strides[m], x.dtype);
      for (std::size_t i = 0; i < targets.size(); ++i) {
        const Span& target = targets[i];
        const bool replaces = vectors.is(replaced) && i + 1 == targets.size() && !last.is_none();
        if (replaces && own.begin == target.begin && own.dtype == target.dtype && own.stride == 1) continue;
        if (target.shares(own)) return false;
      }
    }
  }
  return true;
}

}  // namespace fedkern
