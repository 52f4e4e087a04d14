// fedkern._cuda.distill_ensemble: the arguments of fedkern._cpu.distill_ensemble, with a stream in the place of the threads.
#include "distill_ensemble_call.h"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern {
namespace {

void distill_ensemble(const py::args& arguments) {
  if (arguments.size() != kEnsembleArguments + 2)
    throw py::type_error("fedkern._cuda.distill_ensemble takes 20 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  TensorView teachers;
  std::int64_t rows, memory;
  const EnsembleCall call = parse_ensemble(item, teachers, rows, false);
  const Optional<double> workspace = parse_workspace(item[kEnsembleArguments], memory);
  void* const stream = PyLong_AsVoidPtr(item[kEnsembleArguments + 1]);
  if (PyErr_Occurred()) throw py::error_already_set();
  const std::int64_t slots = (memory - cuda::kEnsembleTotals) / (cuda::kEnsembleNumbers * call.count);
  if (slots < cuda::kEnsembleSlots) throw py::value_error("too small a workspace");
  cuda::distill_ensemble(call, workspace.data, slots, teachers.gpu(), stream);
}

}  // namespace

void bind_cuda_distill_ensemble(py::module_& module) {
  module.attr("ensemble_numbers") = cuda::kEnsembleNumbers;
  module.attr("ensemble_totals") = cuda::kEnsembleTotals;
  module.attr("ensemble_slots") = cuda::kEnsembleSlots;
  module.def("distill_ensemble", distill_ensemble);
}

}  // namespace fedkern
