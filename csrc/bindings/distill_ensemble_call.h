// A call on K teachers as Python makes it, with the conventions of distill_call.h.
#pragma once

#include "distill_rows.h"
#include "fedkern/distill_ensemble.h"

namespace fedkern {

// As kDistillArguments.
inline constexpr std::size_t kEnsembleArguments = 18;

// With the teachers' stride first and the class stride third.
inline Stack parse_stack(PyObject* object) {
  Stack result;
  parse_strided(object, result, &result.stack_stride, &result.class_stride);
  return result;
}

// Checked weights of teachers with `row_dims` row dimensions: a tensor [K], [K, *rows], or [K, B, C or 1, *positions].
inline Stack parse_weights(PyObject* object, int row_dims) {
  if (object == Py_None) return {};
  const TensorView tensor = checked_view(object);
  Stack result;
  result.data = tensor.data, result.present = true;
  if (!tensor.floating(result.dtype)) throw py::type_error("fedkern's kernels take floating tensors");
  result.stack_stride = tensor.strides[0];
  const bool by_class = tensor.dims == row_dims + 2;
  std::int64_t* rows = result.row_stride;
  for (int d = 1; d < tensor.dims; ++d) {
    if (!by_class || d != 2)
      *rows++ = tensor.strides[d];
    else if (tensor.shape[2] != 1)  // a weight that all classes share has no stride, whatever that axis says
      result.class_stride = tensor.strides[2];
  }
  return result;
}

inline void merge_row_dims(EnsembleCall& call) {
  std::int64_t* strides[12];
  int tensors = 0;
  const auto add = [&](auto& tensor) {
    if (tensor.present) strides[tensors++] = tensor.row_stride;
  };
  add(call.teachers), add(call.student), add(call.weights);
  add(call.teachers_grad), add(call.student_grad), add(call.weights_grad), add(call.kept);
  for (int i = 0; i < 2; ++i) add(call.grad_output[i]), add(call.row_loss[i]);
  merge_row_dims(call.row_dims, call.row_size, strides, tensors);
}

// Reads kEnsembleArguments from `item` on; `teachers` receives a tensor of their shape and device, `rows` the number of rows.
inline EnsembleCall parse_ensemble(PyObject* const* item, TensorView& teachers, std::int64_t& rows) {
  EnsembleCall call;
  call.kind = static_cast<EnsembleKind>(integer(*item++));
  call.limit = *item++ == Py_True;
  call.as_is = *item++ == Py_True;
  call.by_class = *item++ == Py_True;
  call.compute = static_cast<DType>(integer(*item++));
  call.row_dims = -2;
  rows = 1;
  teachers = checked_view(*item++);
  for (int d = 0; d < teachers.dims; ++d) {
    const std::int64_t size = teachers.shape[d];
    if (++call.row_dims > kMaxRowDims) throw py::value_error("too many dimensions");
    if (d == 0) call.count = size;
    if (d == 2) call.classes = size;
    if (d == 1 || d > 2) call.row_size[d == 1 ? 0 : d - 2] = size, rows *= size;
  }
  call.temperature = PyFloat_AsDouble(*item++);
  call.scale = parse_scale(*item++, rows);
  call.student = parse_logits(*item++);
  call.teachers = parse_stack(*item++);
  call.weights = parse_weights(*item++, call.row_dims);
  PyObject* const mask = *item++;  // a bool tensor [K, C], or None
  if (mask != Py_None) {
    const TensorView known = checked_view(mask);
    if (known.bits != 8 || known.dims != 2) throw py::type_error("fedkern's kernels take a mask of two dimensions and truth values");
    call.mask = {static_cast<const unsigned char*>(known.data), true};
    for (int d = 0; d < 2; ++d) call.mask_stride[d] = known.strides[d];
  }
  call.student_grad = parse_logits(*item++);
  call.teachers_grad = parse_stack(*item++);
  call.weights_grad = parse_weights(*item++, call.row_dims);
  call.grad_output[0] = parse_rows(*item++);
  call.grad_output[1] = parse_rows(*item++);
  // Results: rows or totals, as `by_row` says. What consensus keeps follows where it does.
  const RowValues first = parse_rows(PyTuple_GET_ITEM(*item, 1)), second = parse_rows(PyTuple_GET_ITEM(*item, 2));
  const bool by_row = PyTuple_GET_ITEM(*item, 0) == Py_True;
  for (int i = 0; i < 2; ++i) (by_row ? call.row_loss : call.total)[i] = i == 0 ? first : second;
  if (PyTuple_GET_SIZE(*item) > 3) call.kept = parse_logits(PyTuple_GET_ITEM(*item, 3));
  if (PyErr_Occurred()) throw py::error_already_set();
  if (call.row_dims > 1) merge_row_dims(call);
  return call;
}

}  // namespace fedkern
