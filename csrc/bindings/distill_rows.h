// From Python's tensors to rows, for the distill cores: bare tuples of arguments instead of named ones, since at 64 rows the
// call itself is what takes the time.
#pragma once

#include <cstdlib>
#include <utility>

#include "exchange.h"
#include "fedkern/distill.h"

namespace fedkern {

// The shape and the device that a tensor of a call must have: those of the call's logits, or a part of them.
struct Shape {
  int dims = 0;
  std::int64_t size[kMaxRowDims + 2];
  bool or_none = false;  // a number for all rows will do
  const TensorView* device;

  // The axes of `logits` without the first `skipped`, and without the classes at `classes`.
  static Shape of(const TensorView& logits, int skipped, int classes = -1) {
    Shape result;
    for (int d = skipped; d < logits.dims; ++d)
      if (d != classes) result.size[result.dims++] = logits.shape[d];
    result.device = &logits;
    return result;
  }
  bool fits(const TensorView& tensor) const {
    if (!tensor.same_device(*device)) return false;
    if (or_none && !tensor.dims) return true;
    bool same = tensor.dims == dims;
    for (int d = 0; same && d < dims; ++d) same = tensor.shape[d] == size[d];
    return same;
  }
};

inline std::int64_t integer(PyObject* object) { return PyLong_AsLongLong(object); }

template <typename Kind>
Kind kind_of(PyObject* object, Kind last) {
  const std::int64_t number = integer(object);
  require(number >= 0 && number <= static_cast<std::int64_t>(last), "a loss that fedkern's distill operators do not know");
  return static_cast<Kind>(number);
}

// A tensor, or None. The first stride belongs to `leading` where that is given, the class stride is the second of the
// rest where `classes` is given; what remains are the rows'.
template <typename Tensor>
void parse_strided(PyObject* object, Tensor& to, std::int64_t* leading, std::int64_t* classes, const Shape& expected) {
  if (object == Py_None) return;
  const TensorView tensor = checked_view(object);
  require(expected.fits(tensor), "a tensor of fedkern's distill operators has another shape or device than the logits");
  to.present = true;
  to.data = tensor.data;
  if (!tensor.floating(to.dtype)) throw py::type_error("fedkern's kernels take floating tensors");
  std::int64_t* rows = to.row_stride;
  for (int d = 0; d < tensor.dims; ++d) {
    if (leading && d == 0)
      *leading = tensor.strides[d];
    else if (classes && d == (leading ? 2 : 1))
      *classes = tensor.strides[d];
    else
      *rows++ = tensor.strides[d];
  }
}

// With the class stride second.
inline Logits parse_logits(PyObject* object, const Shape& expected) {
  Logits result;
  parse_strided(object, result, nullptr, &result.class_stride, expected);
  return result;
}

// With a stride per row dimension or none at all.
inline RowValues parse_rows(PyObject* object, const Shape& expected) {
  RowValues result;
  parse_strided(object, result, nullptr, nullptr, expected);
  return result;
}

// Orders row dimensions by the first tensor's strides and merges neighbours that every tensor walks alike.
inline void merge_row_dims(int& row_dims, std::int64_t* row_size, std::int64_t* const* strides, int tensors) {
  for (int end = row_dims; end > 1; --end)
    for (int d = 0; d + 1 < end; ++d)
      if (std::llabs(strides[0][d]) < std::llabs(strides[0][d + 1])) {
        std::swap(row_size[d], row_size[d + 1]);
        for (int i = 0; i < tensors; ++i) std::swap(strides[i][d], strides[i][d + 1]);
      }
  int kept = 0;
  for (int d = 1; d < row_dims; ++d) {
    bool mergeable = true;
    for (int i = 0; i < tensors; ++i)
      mergeable = mergeable && (row_size[kept] == 1 || row_size[d] == 1 || strides[i][kept] == strides[i][d] * row_size[d]);
    if (mergeable) {
      if (row_size[d] != 1)
        for (int i = 0; i < tensors; ++i) strides[i][kept] = strides[i][d];
      row_size[kept] *= row_size[d];
    } else {
      ++kept;
      row_size[kept] = row_size[d];
      for (int i = 0; i < tensors; ++i) strides[i][kept] = strides[i][d];
    }
  }
  row_dims = kept + 1;
}

// One over the number of rows where Python gives None.
inline double parse_scale(PyObject* object, std::int64_t rows) {
  return object != Py_None ? PyFloat_AsDouble(object) : rows ? 1.0 / static_cast<double>(rows) : 1.0;
}

// fp64 memory on the device, or none where Python gives None.
inline Optional<double> parse_workspace(PyObject* object, std::int64_t& elements) {
  elements = 0;
  if (object == Py_None) return {};
  const TensorView tensor = checked_view(object);
  elements = tensor.dims ? tensor.shape[0] : 1;
  return {static_cast<double*>(tensor.data), true};
}

}  // namespace fedkern
