#include "fedkern/optimise_cuda.h"
#include "optimise_call.h"

namespace fedkern {
namespace {

// The arguments of fedkern._cpu.optimise_step. workspace: fp64 of 2 rows optimise_blocks.
void optimise_step(const py::tuple& call, const py::object& each, py::handle finite, py::handle squared, py::handle workspace, std::uintptr_t stream) {
  cuda::OptimiserStep a{};
  const OptimiseSettings settings = parse_optimise(call, a);
  a.adamw = settings.adamw, a.bias = settings.bias, a.max_norm = settings.max_norm;
  if (each.is_none())
    a.lr = PyFloat_AsDouble(field(call, kRate));
  else
    a.lr_each = {optimise_memory<const double>(each, a.rows), true};
  if (PyErr_Occurred()) throw py::error_already_set();
  a.workspace = optimise_memory<double>(workspace, 2 * a.rows * cuda::optimise_blocks(a.rows, a.size)), a.squared = optimise_memory<double>(squared, a.rows), a.finite = optimise_memory<bool>(finite, a.rows);
  cuda::optimise_step(a, checked_view(field(call, kParameters)).gpu(), pointer<void>(stream));
}

}  // namespace

void bind_cuda_optimise(py::module_& module) {
  module.def("optimise_blocks", cuda::optimise_blocks);
  module.def("optimise_step", optimise_step);
}

}  // namespace fedkern
