// A call of the distill cores as Python makes it: a bare tuple of arguments instead of named ones, since at 64 rows the call
// itself is what takes the time. Row dimensions that can be walked as one are merged.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "bindings.h"
#include "fedkern/distill.h"

namespace fedkern {

inline constexpr std::size_t kDistillArguments = 18;

inline std::int64_t integer(PyObject* object) { return PyLong_AsLongLong(object); }

// (data_ptr, dtype, strides) with the class stride second, or None.
inline Logits parse_logits(PyObject* object) {
  Logits result;
  if (object == Py_None) return result;
  result.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(object, 0));
  result.dtype = static_cast<DType>(integer(PyTuple_GET_ITEM(object, 1)));
  PyObject* const strides = PyTuple_GET_ITEM(object, 2);
  const int dims = static_cast<int>(PyTuple_GET_SIZE(strides));
  result.class_stride = integer(PyTuple_GET_ITEM(strides, 1));
  for (int d = 0; d < dims; ++d)
    if (d != 1) result.row_stride[d == 0 ? 0 : d - 1] = integer(PyTuple_GET_ITEM(strides, d));
  return result;
}

// (data_ptr, dtype, strides) with a stride per row dimension or none at all, or None.
inline RowValues parse_rows(PyObject* object) {
  RowValues result;
  if (object == Py_None) return result;
  result.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(object, 0));
  result.dtype = static_cast<DType>(integer(PyTuple_GET_ITEM(object, 1)));
  PyObject* const strides = PyTuple_GET_ITEM(object, 2);
  for (int d = 0; d < static_cast<int>(PyTuple_GET_SIZE(strides)); ++d)
    result.row_stride[d] = integer(PyTuple_GET_ITEM(strides, d));
  return result;
}

// Orders the row dimensions by the student's strides and merges neighbours that every tensor walks alike.
inline void merge_row_dims(DistillCall& call) {
  std::int64_t* strides[2 * (1 + kMaxStudents) + 4];
  int tensors = 0;
  const auto add = [&](auto& tensor) {
    if (tensor.data) strides[tensors++] = tensor.row_stride;
  };
  for (int k = call.students - 1; k >= 0; --k) add(call.student[k]);
  add(call.teacher), add(call.teacher_grad), add(call.weight), add(call.grad_output), add(call.row_loss), add(call.raw_loss);
  for (int k = 0; k < call.students; ++k) add(call.student_grad[k]);

  for (int end = call.row_dims; end > 1; --end)
    for (int d = 0; d + 1 < end; ++d)
      if (std::llabs(strides[0][d]) < std::llabs(strides[0][d + 1])) {
        std::swap(call.row_size[d], call.row_size[d + 1]);
        for (int i = 0; i < tensors; ++i) std::swap(strides[i][d], strides[i][d + 1]);
      }
  int kept = 0;
  for (int d = 1; d < call.row_dims; ++d) {
    bool mergeable = true;
    for (int i = 0; i < tensors; ++i)
      mergeable = mergeable && (call.row_size[kept] == 1 || call.row_size[d] == 1 ||
                                strides[i][kept] == strides[i][d] * call.row_size[d]);
    if (mergeable) {
      if (call.row_size[d] != 1)
        for (int i = 0; i < tensors; ++i) strides[i][kept] = strides[i][d];
      call.row_size[kept] *= call.row_size[d];
    } else {
      ++kept;
      call.row_size[kept] = call.row_size[d];
      for (int i = 0; i < tensors; ++i) strides[i][kept] = strides[i][d];
    }
  }
  call.row_dims = kept + 1;
}

// Reads kDistillArguments from `item` on; `elements` receives the size of a tensor of logits.
inline DistillCall parse_distill(PyObject* const* item, std::int64_t& elements) {
  DistillCall call;
  call.kind = static_cast<DistillKind>(integer(*item++));
  call.compute = static_cast<DType>(integer(*item++));
  PyObject* const shape = *item++;
  const int dims = static_cast<int>(PyTuple_GET_SIZE(shape));
  if (dims - 1 > kMaxRowDims) throw py::value_error("too many dimensions");
  call.row_dims = dims - 1;
  elements = 1;
  for (int d = 0; d < dims; ++d) {
    const std::int64_t size = integer(PyTuple_GET_ITEM(shape, d));
    (d == 1 ? call.classes : call.row_size[d == 0 ? 0 : d - 1]) = size;
    elements *= size;
  }
  call.temperature = PyFloat_AsDouble(*item++);
  call.reverse = *item++ == Py_True;
  PyObject* const scale = *item++;  // None: one over the number of rows
  call.scale = scale != Py_None ? PyFloat_AsDouble(scale) : elements ? static_cast<double>(call.classes) / static_cast<double>(elements) : 1.0;
  call.threads = static_cast<int>(integer(*item++));
  call.students = static_cast<int>(integer(*item++));
  call.teacher = parse_logits(*item++);
  for (Logits& student : call.student) student = parse_logits(*item++);
  call.teacher_grad = parse_logits(*item++);
  for (Logits& grad : call.student_grad) grad = parse_logits(*item++);
  call.weight = parse_rows(*item++);
  call.grad_output = parse_rows(*item++);
  call.row_loss = parse_rows(*item++);
  PyObject* const last = *item++;
  if (PyErr_Occurred()) throw py::error_already_set();
  // (raw_loss, total): what a caller rarely wants both of shares one argument.
  call.raw_loss = parse_rows(PyTuple_GET_ITEM(last, 0));
  call.total = parse_rows(PyTuple_GET_ITEM(last, 1));
  if (PyErr_Occurred()) throw py::error_already_set();
  if (elements == 0) {  // empty tensors have no address to tell absent ones from
    call.row_dims = 1;
    call.row_size[0] = 0;
  } else if (call.row_dims > 1) {
    merge_row_dims(call);
  }
  return call;
}

}  // namespace fedkern
