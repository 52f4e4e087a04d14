// fedkern._cuda.distill: the arguments of fedkern._cpu.distill, then workspace (or None), device and stream.
#include "distill_call.h"
#include "fedkern/distill_cuda.h"

namespace fedkern {
namespace {

void distill(const py::args& arguments) {
  if (arguments.size() != kDistillArguments + 3) throw py::type_error("fedkern._cuda.distill takes 21 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  std::int64_t elements;
  const DistillCall call = parse_distill(item, elements);
  Optional<double> workspace;
  if (item[kDistillArguments] != Py_None) workspace = {static_cast<double*>(PyLong_AsVoidPtr(item[kDistillArguments])), true};
  const int device = static_cast<int>(integer(item[kDistillArguments + 1]));
  void* const stream = PyLong_AsVoidPtr(item[kDistillArguments + 2]);
  if (PyErr_Occurred()) throw py::error_already_set();
  cuda::distill(call, workspace, device, stream);
}

}  // namespace

void bind_cuda_distill(py::module_& module) {
  module.attr("distill_workspace") = cuda::kDistillWorkspace;
  module.def("distill", distill);
}

}  // namespace fedkern
