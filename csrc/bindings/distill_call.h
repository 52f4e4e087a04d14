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

// kept_numbers() for each row, one row after another.
inline Optional<void> parse_kept(PyObject* object, const DistillCall& call, const TensorView& logits, std::int64_t rows) {
  if (object == Py_None) return {};
  const TensorView tensor = checked_view(object);
  DType dtype;
  require(tensor.floating(dtype) && dtype == call.compute && tensor.same_device(logits) && tensor.dims == 1 &&
              tensor.shape[0] == rows * kept_numbers(call) && (tensor.strides[0] == 1 || tensor.shape[0] < 2),
          "what a distill operator keeps has another form");
  return {tensor.data, true};
}

// Reads kDistillArguments from `item` on; `logits` receives a tensor of their shape and device, `elements` its size.
inline DistillCall parse_distill(PyObject* const* item, TensorView& logits, std::int64_t& elements) {
  DistillCall call;
  call.kind = kind_of<DistillKind>(*item++, DistillKind::entropy);
  call.compute = static_cast<DType>(integer(*item++));
  call.row_dims = -1;
  elements = 1;
  logits = checked_view(*item++);
  require(logits.dims >= 2 && logits.dims <= kMaxRowDims + 1 && logits.shape[1], "logits must be [B, C, *positions] with a class, of at most 9 axes");
  for (int d = 0; d < logits.dims; ++d) {
    ++call.row_dims;
    (d == 1 ? call.classes : call.row_size[d == 0 ? 0 : d - 1]) = logits.shape[d];
    elements *= logits.shape[d];
  }
  call.temperature = PyFloat_AsDouble(*item++);
  call.reverse = *item++ == Py_True;
  call.scale = parse_scale(*item++, elements / call.classes);
  call.students = static_cast<int>(integer(*item++));
  const Shape all = Shape::of(logits, 0), rows = Shape::of(logits, 0, 1), one{0, {}, false, &logits};
  Shape rows_or_one = rows;
  rows_or_one.or_none = true;
  call.teacher = parse_logits(*item++, all);
  for (Logits& student : call.student) student = parse_logits(*item++, all);
  call.teacher_grad = parse_logits(*item++, all);
  for (Logits& grad : call.student_grad) grad = parse_logits(*item++, all);
  call.weight = parse_rows(*item++, rows);
  call.grad_output = parse_rows(*item++, rows_or_one);
  call.row_loss = parse_rows(*item++, rows);
  PyObject* const last = *item++;
  if (PyErr_Occurred()) throw py::error_already_set();
  // (raw_loss, total, kept): what a caller rarely wants all of shares one argument.
  call.raw_loss = parse_rows(PyTuple_GET_ITEM(last, 0), rows);
  call.total = parse_rows(PyTuple_GET_ITEM(last, 1), one);
  call.kept = parse_kept(PyTuple_GET_ITEM(last, 2), call, logits, elements / call.classes);
  if (PyErr_Occurred()) throw py::error_already_set();
  const bool entropy = call.kind == DistillKind::entropy;
  require(call.teacher.present, "a loss takes logits");
  require(call.students == (entropy ? 0 : call.student[1].present ? 2 : 1) && (entropy || call.student[0].present), "students are missing, or too many");
  require(call.temperature > 0, "temperature must be above 0");
  require(call.compute == DType::f32 || call.compute == DType::f64, "losses are computed in float32 or float64");
  if (call.row_dims > 1) merge_row_dims(call);
  return call;
}

}  // namespace fedkern
