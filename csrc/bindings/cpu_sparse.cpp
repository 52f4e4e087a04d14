// fedkern._cpu.sparse_kl: takes tensors as Python has them.
#include "exchange.h"
#include "fedkern/sparse.h"

namespace fedkern {
namespace {

// A tensor [rows, size] whose rows have no gaps, or None; size -1: any.
ClassRows class_rows(py::handle given, std::int64_t rows, std::int64_t size) {
  if (given.is_none()) return {};
  const TensorView seen = checked_view(given.ptr());
  ClassRows result{seen.data, true, DType::f32, seen.dims == 2 ? seen.strides[0] : 0};
  require(seen.dims == 2 && seen.shape[1] && (rows < 0 || (seen.shape[0] == rows && (size < 0 || seen.shape[1] == size))) && seen.floating(result.dtype) &&
              seen.device_type == TensorView::kCpu && (seen.shape[1] == 1 || seen.strides[1] == 1),
          "sparse_kl takes floating rows on the CPU, without gaps");
  return result;
}

// A tensor [rows] without gaps, or one number for all, or None.
RowNumbers row_numbers(py::handle given, std::int64_t rows) {
  if (given.is_none()) return {};
  const TensorView seen = checked_view(given.ptr());
  RowNumbers result{seen.data, true, DType::f32, seen.dims};
  require(seen.floating(result.dtype) && seen.device_type == TensorView::kCpu && (!seen.dims || (seen.dims == 1 && seen.shape[0] == rows && seen.contiguous())),
          "sparse_kl takes floating numbers on the CPU, one for each row");
  return result;
}

// Writes the rows' losses, or their sum times `scale` into a result without axes. False, and nothing done that counts, where indices
// or values are none of a teacher.
bool sparse_kl(py::handle student, py::handle values, py::handle indices, bool spreads, py::handle weight, py::handle grad, py::handle gradient, py::handle result,
               double temperature, double scale, int threads) {
  SparseCall call{};
  const TensorView logits = checked_view(student.ptr()), kept = checked_view(values.ptr()), places = checked_view(indices.ptr());
  call.student = class_rows(student, -1, -1);
  call.rows = logits.shape[0], call.classes = logits.shape[1];
  call.values = class_rows(values, call.rows, -1);
  call.count = kept.shape[1];
  require(kept.contiguous() && places.same_shape(kept) && places.contiguous() && places.code == 0 && places.bits == 64 && places.same_device(kept) && call.count <= call.classes,
          "sparse_kl takes values and int64 indices [rows, k] without gaps, k at most the number of classes");
  call.indices = static_cast<const std::int64_t*>(places.data);
  call.spreads = spreads, call.weight = row_numbers(weight, call.rows), call.grad = row_numbers(grad, call.rows);
  call.gradient = class_rows(gradient, call.rows, call.classes);
  require(!call.gradient.present || call.gradient.dtype == call.student.dtype, "a gradient has its tensor's dtype");
  require(temperature > 0, "temperature must be above 0");
  const RowNumbers to = row_numbers(result, call.rows);
  (to.step ? call.losses : call.total) = to;
  call.temperature = temperature, call.scale = scale, call.threads = threads;
  ReleaseGil release(call.rows * call.classes >= kReleaseGilElements);
  return sparse_kernels().run(call);
}

}  // namespace

void bind_sparse(py::module_& module) { module.def("sparse_kl", sparse_kl); }

}  // namespace fedkern
