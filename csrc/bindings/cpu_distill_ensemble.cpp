// fedkern._cpu.distill_ensemble: takes shapes and strides as Python has them.
#include "distill_ensemble_call.h"

namespace fedkern {
namespace {

void distill_ensemble(const py::args& arguments) {
  if (arguments.size() != kEnsembleArguments)
    throw py::type_error("fedkern._cpu.distill_ensemble takes 19 arguments; call it through fedkern.ops");
  std::int64_t rows;
  const EnsembleCall call = parse_ensemble(&PyTuple_GET_ITEM(arguments.ptr(), 0), rows);
  ReleaseGil release(rows * call.classes * call.count >= kReleaseGilElements);
  distill_ensemble_kernels().run(call);
}

}  // namespace

void bind_distill_ensemble(py::module_& module) { module.def("distill_ensemble", distill_ensemble); }

}  // namespace fedkern
