// fedkern._cuda.distill_ensemble: the arguments of fedkern._cpu.distill_ensemble, then workspace, slots, device and stream.
#include "distill_ensemble_call.h"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern {
namespace {

void distill_ensemble(const py::args& arguments) {
  if (arguments.size() != kEnsembleArguments + 4)
    throw py::type_error("fedkern._cuda.distill_ensemble takes 23 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  std::int64_t rows;
  const EnsembleCall call = parse_ensemble(item, rows);
  void* const workspace = PyLong_AsVoidPtr(item[kEnsembleArguments]);
  const std::int64_t slots = integer(item[kEnsembleArguments + 1]);
  const int device = static_cast<int>(integer(item[kEnsembleArguments + 2]));
  void* const stream = PyLong_AsVoidPtr(item[kEnsembleArguments + 3]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (slots < cuda::kEnsembleSlots) throw py::value_error("too few slots");
  cuda::distill_ensemble(call, static_cast<double*>(workspace), slots, device, stream);
}

}  // namespace

void bind_cuda_distill_ensemble(py::module_& module) {
  module.attr("ensemble_numbers") = cuda::kEnsembleNumbers;
  module.attr("ensemble_totals") = cuda::kEnsembleTotals;
  module.attr("ensemble_slots") = cuda::kEnsembleSlots;
  module.def("distill_ensemble", distill_ensemble);
}

}  // namespace fedkern
