// A call on K teachers as Python makes it, with the conventions of distill_call.h.
#pragma once

#include "distill_rows.h"
#include "fedkern/distill_ensemble.h"

namespace fedkern {

// As kDistillArguments.
inline constexpr std::size_t kEnsembleArguments = 18;

// With the teachers' stride first and the class stride third.
inline Stack parse_stack(PyObject* object, const Shape& expected) {
  Stack result;
  parse_strided(object, result, &result.stack_stride, &result.class_stride, expected);
  return result;
}

// Weights of teachers [K, B, C, *positions]: a tensor [K], [K, *rows], or [K, B, C or 1, *positions].
inline Stack parse_weights(PyObject* object, const TensorView& teachers, bool with_classes) {
  if (object == Py_None) return {};
  const TensorView tensor = checked_view(object);
  Stack result;
  result.data = tensor.data, result.present = true;
  if (!tensor.floating(result.dtype)) throw py::type_error("fedkern's kernels take floating tensors");
  const bool by_class = tensor.dims == teachers.dims;
  bool fits = tensor.same_device(teachers) && (by_class || tensor.dims == 1 || tensor.dims == teachers.dims - 1);
  for (int d = 0; fits && d < tensor.dims; ++d) {
    const std::int64_t size = teachers.shape[!by_class && d > 1 ? d + 1 : d];
    fits = tensor.shape[d] == size || (by_class && d == 2 && tensor.shape[d] == 1);
  }
  require(fits && (with_classes || !by_class || tensor.shape[2] == 1), "weights must be [K], [K, *rows] or, where they differ by class, [K, B, C, *positions]");
  result.stack_stride = tensor.strides[0];
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
// `mixture`: whether a row's mixture is kept too.
inline EnsembleCall parse_ensemble(PyObject* const* item, TensorView& teachers, std::int64_t& rows, bool mixture) {
  EnsembleCall call;
  call.kind = kind_of<EnsembleKind>(*item++, EnsembleKind::consensus);
  call.limit = *item++ == Py_True;
  call.as_is = *item++ == Py_True;
  call.by_class = *item++ == Py_True;
  call.compute = static_cast<DType>(integer(*item++));
  call.row_dims = -2;
  rows = 1;
  teachers = checked_view(*item++);
  require(teachers.dims >= 3 && teachers.dims <= kMaxRowDims + 2 && teachers.shape[0] && teachers.shape[2],
          "teachers must be [K, B, C, *positions] with a teacher and a class, of at most 10 axes");
  for (int d = 0; d < teachers.dims; ++d) {
    const std::int64_t size = teachers.shape[d];
    ++call.row_dims;
    if (d == 0) call.count = size;
    if (d == 2) call.classes = size;
    if (d == 1 || d > 2) call.row_size[d == 1 ? 0 : d - 2] = size, rows *= size;
  }
  call.temperature = PyFloat_AsDouble(*item++);
  call.scale = parse_scale(*item++, rows);
  const Shape stack = Shape::of(teachers, 0), one = Shape::of(teachers, 1), row = Shape::of(teachers, 1, 2), number{0, {}, false, &teachers};
  Shape row_or_number = row;
  row_or_number.or_none = true;
  call.student = parse_logits(*item++, one);
  call.teachers = parse_stack(*item++, stack);
  call.weights = parse_weights(*item++, teachers, call.by_class);
  PyObject* const mask = *item++;  // a bool tensor [K, C], or None
  if (mask != Py_None) {
    const TensorView known = checked_view(mask);
    if (known.bits != 8 || known.dims != 2) throw py::type_error("fedkern's kernels take a mask of two dimensions and truth values");
    require(known.shape[0] == call.count && known.shape[1] == call.classes && known.same_device(teachers) && call.by_class, "class_mask must be [K, C]");
    call.mask = {static_cast<const unsigned char*>(known.data), true};
    for (int d = 0; d < 2; ++d) call.mask_stride[d] = known.strides[d];
  }
  call.student_grad = parse_logits(*item++, one);
  call.teachers_grad = parse_stack(*item++, stack);
  call.weights_grad = parse_weights(*item++, teachers, call.by_class);
  call.grad_output[0] = parse_rows(*item++, row_or_number);
  call.grad_output[1] = parse_rows(*item++, row_or_number);
  // Results: rows or totals, as `by_row` says. What a loss keeps follows where it does.
  const bool by_row = PyTuple_GET_ITEM(*item, 0) == Py_True;
  const Shape& result = by_row ? row : number;
  const RowValues first = parse_rows(PyTuple_GET_ITEM(*item, 1), result), second = parse_rows(PyTuple_GET_ITEM(*item, 2), result);
  for (int i = 0; i < 2; ++i) (by_row ? call.row_loss : call.total)[i] = i == 0 ? first : second;
  Shape kept = one;
  kept.size[1] = 4 * call.count + (mixture ? call.classes : 0);
  if (PyTuple_GET_SIZE(*item) > 3) call.kept = parse_logits(PyTuple_GET_ITEM(*item, 3), kept);
  if (PyErr_Occurred()) throw py::error_already_set();
  const bool against_student = call.kind <= EnsembleKind::mean;
  require(call.teachers.present, "a loss of teachers takes them");
  require(call.student.present == against_student && (against_student || !call.student_grad.present), "the loss of a student against teachers takes a student");
  require(!call.by_class || call.kind <= EnsembleKind::logits, "weights by class and masks mix probabilities or logits");
  require(call.weights.present || !call.weights_grad.present, "weights that are not there have no gradient");
  require(!call.kept.present || call.kept.dtype == call.compute, "what a loss keeps has another dtype");
  require(call.temperature > 0, "temperature must be above 0");
  require(call.compute == DType::f32 || call.compute == DType::f64, "losses are computed in float32 or float64");
  if (call.row_dims > 1) merge_row_dims(call);
  return call;
}

}  // namespace fedkern
