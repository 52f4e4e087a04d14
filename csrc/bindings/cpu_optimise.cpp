#include <cmath>
#include <memory>
#include <vector>

#include "fedkern/optimise.h"
#include "fedkern/parallel.h"
#include "optimise_call.h"

namespace fedkern {
namespace {

// One learning rate for all rows or a list or tuple of one each; `each` holds them where it is given.
std::vector<double> rates_of(PyObject* given, const py::object& each, std::int64_t rows) {
  const auto count = static_cast<std::size_t>(rows);
  if (!each.is_none()) {
    const auto* const values = optimise_memory<const double>(each, rows);
    return {values, values + count};
  }
  std::vector<double> rates(count);
  if (PyList_Check(given) || PyTuple_Check(given)) {
    const py::tuple values = py::reinterpret_steal<py::tuple>(PySequence_Tuple(given));  // others may change the list
    if (!values || values.size() != count) throw py::value_error("lr must hold one number for each row");
    for (std::size_t m = 0; m < count; ++m) rates[m] = PyFloat_AsDouble(PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(m)));
  } else {
    rates.assign(count, PyFloat_AsDouble(given));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return rates;
}

// One step. each: fp64 [rows] of learning rates, or None where the call holds them; finite, squared: the results, [rows]. The
// workspace is the CUDA core's.
void optimise_step(const py::tuple& call, const py::object& each, py::handle finite, py::handle squared, py::handle, int threads) {
  OptimiserStep a{};
  const OptimiseSettings settings = parse_optimise(call, a);
  a.rule = settings.adamw ? OptimiserRule::adamw : OptimiserRule::sgd, a.threads = threads;
  std::vector<double> rates = rates_of(field(call, kRate), each, a.rows);
  auto* const squares = optimise_memory<double>(squared, a.rows);
  auto* const all_finite = optimise_memory<bool>(finite, a.rows);
  ReleaseGil release(a.size * a.rows >= kReleaseGilElements);
  take_step(a, settings, rates, squares, all_finite);
}

}  // namespace

void take_step(OptimiserStep& a, const OptimiseSettings& settings, std::vector<double>& rates, double* squared, bool* all_finite) {
  const double max_norm = settings.max_norm;
  const bool adamw = a.rule == OptimiserRule::adamw;
  std::vector<double> decays(adamw ? rates.size() : 0), scales(max_norm > 0 ? rates.size() : 0);
  for (std::size_t m = 0; m < rates.size(); ++m) {
    if (adamw) decays[m] = 1 - rates[m] * a.weight_decay;
    rates[m] = adamw ? -rates[m] / settings.bias : -rates[m];
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

void bind_optimise(py::module_& module) { module.def("optimise_step", optimise_step); }

}  // namespace fedkern
