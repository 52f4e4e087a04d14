// fedkern._cpu.distill: takes tensors as Python has them.
#include "distill_call.h"

namespace fedkern {
namespace {

void distill(const py::args& arguments) {
  if (arguments.size() != kDistillArguments + 2) throw py::type_error("fedkern._cpu.distill takes 19 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  TensorView logits;
  std::int64_t elements;
  DistillCall call = parse_distill(item, logits, elements);
  call.threads = static_cast<int>(integer(item[kDistillArguments + 1]));  // after the CUDA core's workspace
  if (PyErr_Occurred()) throw py::error_already_set();
  ReleaseGil release(elements >= kReleaseGilElements);
  distill_kernels().run(call);
}

}  // namespace

void bind_distill(py::module_& module) {
  module.def("distill", distill);
  module.def("exp", [](int dtype, std::int64_t count, std::uintptr_t in, std::uintptr_t out) {
    distill_kernels().exp(static_cast<DType>(dtype), count, pointer<const void>(in), pointer<void>(out));
  });
  module.def("scaled_exp", [](int dtype, std::int64_t count, std::uintptr_t in, std::uintptr_t out, double temperature) {
    distill_kernels().scaled_exp(static_cast<DType>(dtype), count, pointer<const void>(in), pointer<void>(out),
                                 temperature);
  });
}

}  // namespace fedkern
