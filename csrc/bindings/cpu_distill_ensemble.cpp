// fedkern._cpu.distill_ensemble: takes tensors as Python has them.
#include "distill_ensemble_call.h"

namespace fedkern {
namespace {

void distill_ensemble(const py::args& arguments) {
  if (arguments.size() != kEnsembleArguments + 2)
    throw py::type_error("fedkern._cpu.distill_ensemble takes 20 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  TensorView teachers;
  std::int64_t rows;
  EnsembleCall call = parse_ensemble(item, teachers, rows, true);
  call.threads = static_cast<int>(integer(item[kEnsembleArguments + 1]));  // after the CUDA core's workspace
  if (PyErr_Occurred()) throw py::error_already_set();
  ReleaseGil release(rows * call.classes * call.count >= kReleaseGilElements);
  distill_ensemble_kernels().run(call);
}

}  // namespace

void bind_distill_ensemble(py::module_& module) { module.def("distill_ensemble", distill_ensemble); }

}  // namespace fedkern
