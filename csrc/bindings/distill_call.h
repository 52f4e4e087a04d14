// A call of the distill cores as Python makes it. Row dimensions that can be walked as one are merged.
#pragma once

#include "distill_rows.h"

namespace fedkern {

// Those of both cores, before a workspace (of the CUDA core) and the threads of the CPU core or the stream of the CUDA core.
inline constexpr std::size_t kDistillArguments = 17;

inline void merge_row_dims(DistillCall& call) {
  std::int64_t* strides[2 * (1 + kMaxStudents) + 4];
  int tensors = 0;
  const auto add = [&](auto& tensor) {
    if (tensor.present) strides[tensors++] = tensor.row_stride;
  };
  for (int k = call.students - 1; k >= 0; --k) add(call.student[k]);
  add(call.teacher), add(call.teacher_grad), add(call.weight), add(call.grad_output), add(call.row_loss), add(call.raw_loss);
  for (int k = 0; k < call.students; ++k) add(call.student_grad[k]);
  merge_row_dims(call.row_dims, call.row_size, strides, tensors);
}

// Reads kDistillArguments from `item` on; `logits` receives a tensor of their shape and device, `elements` its size.
inline DistillCall parse_distill(PyObject* const* item, TensorView& logits, std::int64_t& elements) {
  DistillCall call;
  call.kind = static_cast<DistillKind>(integer(*item++));
  call.compute = static_cast<DType>(integer(*item++));
  call.row_dims = -1;
  elements = 1;
  logits = checked_view(*item++);
  for (int d = 0; d < logits.dims; ++d) {
    if (++call.row_dims > kMaxRowDims) throw py::value_error("too many dimensions");
    (d == 1 ? call.classes : call.row_size[d == 0 ? 0 : d - 1]) = logits.shape[d];
    elements *= logits.shape[d];
  }
  call.temperature = PyFloat_AsDouble(*item++);
  call.reverse = *item++ == Py_True;
  call.scale = parse_scale(*item++, elements / call.classes);
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
  if (call.row_dims > 1) merge_row_dims(call);
  return call;
}

}  // namespace fedkern
