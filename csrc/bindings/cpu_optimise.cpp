#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "exchange.h"
#include "fedkern/optimise.h"
#include "fedkern/parallel.h"

namespace fedkern {
namespace {

PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }

bool is_false(PyObject* found) {
  const bool result = found == Py_False;
  if (!found) PyErr_Clear();
  Py_XDECREF(found);
  return result;
}

// A float or an int, finite, of [low, high).
bool number(PyObject* given, double low, double high, double& value) {
  if (!PyFloat_CheckExact(given) && !PyLong_CheckExact(given)) return false;
  value = PyFloat_AsDouble(given);
  if (value == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  return value >= low && value < high;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a call's tensors have in common, and where each lies.
struct Given {
  bool recorded = false;  // autograd is on
  DType dtype{};
  int dims = 0;
  std::int64_t rows = 1, size = 0;
  struct Span {
    std::uintptr_t begin;
    std::size_t step, bytes;  // from row to row, of a row
    bool written;
  };
  Span spans[7];
  int count = 0;

  // Whether the kernel may take `tensor` ([size] or [rows, size]; what is only read may be [size] for all rows), or it is None.
  bool take(PyObject* tensor, bool written, RowsOf& found) {
    static PyObject *const is_neg = name_of("is_neg"), *const requires_grad = name_of("requires_grad");
    if (tensor == Py_None) return true;
    TensorView seen;
    DType own;
    if (!is_tensor(tensor)) return false;
    if (!view(tensor, seen)) return PyErr_Clear(), false;
    if (!seen.on_cpu() || !seen.floating(own) || (!seen.data && !seen.empty())) return false;
    if (!is_false(PyObject_CallMethodNoArgs(tensor, is_neg))) return false;
    if (recorded && !is_false(PyObject_GetAttr(tensor, requires_grad))) return false;
    if (!count) {
      if (seen.dims != 1 && seen.dims != 2) return false;
      dtype = own, dims = seen.dims, size = seen.shape[dims - 1], rows = dims == 2 ? seen.shape[0] : 1;
    }
    const bool shared = !written && seen.dims == 1 && dims == 2;
    if (own != dtype || (seen.dims != dims && !shared) || seen.shape[seen.dims - 1] != size) return false;
    if (seen.dims == 2 && seen.shape[0] != rows) return false;
    if (size > 1 && seen.strides[seen.dims - 1] != 1) return false;
    const std::int64_t step = seen.dims == 2 && rows > 1 ? seen.strides[0] : 0;
    if (written && rows > 1 && step < size) return false;
    found = {seen.data, step, true};
    const std::size_t item = item_size(dtype);
    spans[count++] = {reinterpret_cast<std::uintptr_t>(seen.data), static_cast<std::size_t>(step) * item, static_cast<std::size_t>(size) * item, written};
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

// A number for all rows, or (`each`) a list or tuple of one each.
bool rates_of(PyObject* given, std::int64_t rows, bool each, std::vector<double>& rates) {
  double value;
  if (number(given, 0, kInfinity, value)) return rates.assign(static_cast<std::size_t>(rows), value), true;
  if (!each || (!PyList_CheckExact(given) && !PyTuple_CheckExact(given))) return false;
  if (PySequence_Fast_GET_SIZE(given) != rows) return false;
  rates.resize(static_cast<std::size_t>(rows));
  for (std::int64_t m = 0; m < rows; ++m)
    if (!number(PySequence_Fast_GET_ITEM(given, m), 0, kInfinity, rates[static_cast<std::size_t>(m)])) return false;
  return true;
}

// Runs both passes; squared and all_finite: [rows].
void run(OptimiserStep& a, std::vector<double>& rates, double bias, double weight_decay, double max_norm, double* squared, bool* all_finite) {
  const bool adamw = a.rule == OptimiserRule::adamw;
  std::vector<double> decays(adamw ? rates.size() : 0), scales(max_norm > 0 ? rates.size() : 0);
  for (std::size_t m = 0; m < rates.size(); ++m) {
    if (adamw) decays[m] = 1 - rates[m] * weight_decay;
    rates[m] = adamw ? -rates[m] / bias : -rates[m];
  }
  a.rates = rates.data(), a.decays = decays.data();
  a.chunk = vector_chunk(a.size);
  const std::int64_t chunks = (a.size + a.chunk - 1) / a.chunk;
  const auto units = static_cast<std::size_t>(a.rows * chunks);
  constexpr std::size_t kFew = 32;
  double few_squares[kFew];
  bool few_finite[kFew];
  const std::unique_ptr<double[]> more_squares(units > kFew ? new double[units] : nullptr);
  const std::unique_ptr<bool[]> more_finite(units > kFew ? new bool[units] : nullptr);
  a.squares = more_squares ? more_squares.get() : few_squares;
  a.finite = more_finite ? more_finite.get() : few_finite;
  const OptimiseTable& kernels = optimise_kernels();
  auto add_up = [&] {
    for (std::int64_t m = 0; m < a.rows; ++m) {
      double sum = 0;
      for (std::int64_t c = 0; c < chunks; ++c) sum += a.squares[m * chunks + c];
      squared[m] = sum;
    }
  };
  a.scales = nullptr;
  if (max_norm > 0) {
    kernels.squares(a);
    add_up();
    for (std::int64_t m = 0; m < a.rows; ++m) {
      const double norm = std::sqrt(squared[m]);
      scales[static_cast<std::size_t>(m)] = norm <= max_norm ? 1.0 : max_norm / norm;  // NaN where the norm is
    }
    a.scales = scales.data();
  }
  kernels.step(a);
  if (!a.scales) add_up();
  for (std::int64_t m = 0; m < a.rows; ++m) {
    bool finite = std::isfinite(squared[m]);
    for (std::int64_t c = 0; c < chunks; ++c) finite = finite && a.finite[m * chunks + c];
    all_finite[m] = finite;
  }
}

// One step; false, with nothing written, where an argument is wrong or not as the kernel can take it: Python then says what.
// tensors: parameters, gradients, first, second, anchor, correction, gradient_sum, and the results finite and squared_norm.
// numbers: momentum, weight_decay, proximal, and for AdamW beta1, beta2, 1 - beta1^t, sqrt(1 - beta2^t), eps.
// apart: it is known that nothing written to shares memory with anything else.
bool optimise_step(int rule, const py::tuple& tensors, py::handle lr, const py::tuple& numbers, py::handle max_norm, py::handle zero, bool recorded,
                   bool apart, int threads) {
  if (!PyBool_Check(zero.ptr())) return false;
  OptimiserStep a{};
  a.rule = static_cast<OptimiserRule>(rule), a.zero = zero.ptr() == Py_True, a.threads = threads;
  const bool adamw = a.rule == OptimiserRule::adamw;
  auto tensor = [&](int i) { return PyTuple_GET_ITEM(tensors.ptr(), i); };
  auto setting = [&](int i, double low, double high, double& value) { return number(PyTuple_GET_ITEM(numbers.ptr(), i), low, high, value); };
  if (PyTuple_GET_SIZE(tensors.ptr()) != 9 || PyTuple_GET_SIZE(numbers.ptr()) != (adamw ? 8 : 3)) return false;
  Given given;
  given.recorded = recorded;
  if (!given.take(tensor(0), true, a.parameters) || !a.parameters.present) return false;
  if (!given.take(tensor(1), a.zero, a.gradients) || !a.gradients.present) return false;
  if (given.dims == 2 && given.rows > 1 && !a.gradients.step && given.size) return false;  // gradients are one's own
  if (!given.take(tensor(2), true, a.first) || !given.take(tensor(3), true, a.second)) return false;
  if (!given.take(tensor(4), false, a.anchor) || !given.take(tensor(5), false, a.correction) || !given.take(tensor(6), true, a.gradient_sum)) return false;
  a.dtype = given.dtype, a.rows = given.rows, a.size = given.size;
  double bias = 1, most = 0;
  if (!setting(0, 0, kInfinity, a.momentum) || !setting(1, 0, kInfinity, a.weight_decay) || !setting(2, 0, kInfinity, a.proximal)) return false;
  if (adamw) {
    if (!setting(3, 0, 1, a.beta1) || !setting(4, 0, 1, a.beta2) || !setting(5, 0, 2, bias) || !setting(6, 0, 2, a.root)) return false;
    if (!setting(7, 0, kInfinity, a.eps) || !a.first.present || !a.second.present) return false;
  } else if (a.second.present || (a.momentum != 0) != a.first.present) {
    return false;
  }
  if (a.proximal != 0 && !a.anchor.present) return false;
  if (!max_norm.is_none() && (!number(max_norm.ptr(), 0, kInfinity, most) || most == 0)) return false;
  std::vector<double> rates;
  if (!rates_of(lr.ptr(), a.rows, given.dims == 2, rates) || (!apart && given.overlap())) return false;
  const TensorView finite = checked_view(tensor(7)), squared = checked_view(tensor(8));
  if (!finite.on_cpu() || !squared.on_cpu() || finite.bits != 8 || squared.bits != 64) throw py::type_error("results must be bool and float64");
  ReleaseGil release(a.size * a.rows >= kReleaseGilElements);
  run(a, rates, bias, a.weight_decay, most, static_cast<double*>(squared.data), static_cast<bool*>(finite.data));
  return true;
}

}  // namespace

void bind_optimise(py::module_& module) { module.def("optimise_step", optimise_step); }

}  // namespace fedkern
