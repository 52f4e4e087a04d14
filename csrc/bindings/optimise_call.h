// A step of optimise as Python makes it: a tuple of the fields of Call (fedkern/ops/_optimise/kernels.py), in their order.
#pragma once

#include <vector>

#include "exchange.h"

namespace fedkern {

enum OptimiseField : Py_ssize_t {
  kParameters,
  kGradients,
  kFirst,
  kSecond,
  kAnchor,
  kCorrection,
  kGradientSum,
  kRate,
  kMomentum,
  kWeightDecay,
  kProximal,
  kMaxNorm,
  kZero,
  kAdamW,
  kOptimiseFields
};
// AdamW's own numbers: beta1, beta2, 1 - beta1^t, sqrt(1 - beta2^t), eps.
inline constexpr Py_ssize_t kAdamWNumbers = 5;

inline PyObject* field(const py::tuple& call, Py_ssize_t place) { return PyTuple_GET_ITEM(call.ptr(), place); }

// Whether the tuple is as long as a call, and its numbers of AdamW as long as those.
inline bool is_optimise_call(const py::tuple& call) {
  if (PyTuple_GET_SIZE(call.ptr()) != kOptimiseFields) return false;
  PyObject* const adamw = field(call, kAdamW);
  return adamw == Py_None || (PyTuple_Check(adamw) && PyTuple_GET_SIZE(adamw) == kAdamWNumbers);
}

// What the steps of the two cores take differently.
struct OptimiseSettings {
  bool adamw;
  double bias = 1, max_norm = 0;  // 1 - beta1^t; 0: no clipping
};

// Reads a call into a core's step; the learning rates and the results are the caller's to read.
template <typename Step>
OptimiseSettings parse_optimise(const py::tuple& call, Step& a) {
  if (!is_optimise_call(call)) throw py::type_error("optimise_step takes a call of 14 fields; call it through fedkern.ops");
  const TensorView parameters = checked_view(field(call, kParameters));
  const int dims = parameters.dims;
  if (!parameters.floating(a.dtype) || (dims != 1 && dims != 2)) throw py::type_error("parameters must be floating, of one or two axes");
  a.rows = dims == 2 ? parameters.shape[0] : 1, a.size = parameters.shape[dims - 1];
  const auto rows_of = [&](OptimiseField name, auto& rows) {
    if (field(call, name) == Py_None) return;
    const TensorView seen = checked_view(field(call, name));
    DType dtype;
    // What is only read may be one vector for all rows.
    const bool shared = seen.dims == 1 && (name == kAnchor || name == kCorrection);
    require(seen.same_shape(parameters) || (shared && seen.shape[0] == a.size), "a tensor of the optimiser has another shape than its parameters");
    require(seen.floating(dtype) && dtype == a.dtype && seen.same_device(parameters), "a tensor of the optimiser has another dtype or device than its parameters");
    require(a.size <= 1 || seen.strides[seen.dims - 1] == 1, "vectors of the optimiser have unit stride");
    rows = {seen.data, seen.dims == 2 && a.rows > 1 ? seen.strides[0] : 0, true};
  };
  rows_of(kParameters, a.parameters), rows_of(kGradients, a.gradients), rows_of(kFirst, a.first), rows_of(kSecond, a.second);
  rows_of(kAnchor, a.anchor), rows_of(kCorrection, a.correction), rows_of(kGradientSum, a.gradient_sum);
  const auto number = [&](OptimiseField name) { return PyFloat_AsDouble(field(call, name)); };
  a.momentum = number(kMomentum), a.weight_decay = number(kWeightDecay), a.proximal = number(kProximal);
  a.zero = field(call, kZero) == Py_True;
  PyObject* const adamw = field(call, kAdamW);
  OptimiseSettings settings{adamw != Py_None};
  if (field(call, kMaxNorm) != Py_None) settings.max_norm = number(kMaxNorm);
  if (settings.adamw) {
    const auto own = [&](Py_ssize_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(adamw, i)); };
    a.beta1 = own(0), a.beta2 = own(1), settings.bias = own(2), a.root = own(3), a.eps = own(4);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  require(a.gradients.present, "a step takes gradients");
  require(settings.adamw ? a.first.present && a.second.present : a.momentum == 0 || a.first.present, "the optimiser's states are missing");
  require(a.proximal == 0 || a.anchor.present, "a proximal term takes an anchor");
  return settings;
}

struct OptimiserStep;
// Takes a step on the CPU, in one pass or, with clipping, two. rates: [rows], overwritten; squared, all_finite: results, [rows].
void take_step(OptimiserStep& a, const OptimiseSettings& settings, std::vector<double>& rates, double* squared, bool* all_finite);

// A contiguous tensor of so many T: the results, the workspace, one learning rate per row.
template <typename T>
T* optimise_memory(py::handle tensor, std::int64_t elements) {
  const TensorView seen = checked_view(tensor.ptr());
  std::int64_t size = 1;
  for (int d = 0; d < seen.dims; ++d) size *= seen.shape[d];
  require(size == elements, "results and learning rates are one number for each row of parameters");
  if (seen.bits != 8 * sizeof(T) || seen.code != (sizeof(T) == 1 ? 6 : 2) || !seen.contiguous()) throw py::type_error("memory of optimise_step must be contiguous, of bool or float64");
  return static_cast<T*>(seen.data);
}

}  // namespace fedkern
