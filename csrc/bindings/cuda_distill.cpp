// fedkern._cuda.distill: the arguments of fedkern._cpu.distill, with a stream in the place of the threads.
#include "distill_call.h"
#include "fedkern/distill_cuda.h"

namespace fedkern {
namespace {

void distill(const py::args& arguments) {
  if (arguments.size() != kDistillArguments + 2) throw py::type_error("fedkern._cuda.distill takes 19 arguments; call it through fedkern.ops");
  PyObject* const* const item = &PyTuple_GET_ITEM(arguments.ptr(), 0);
  TensorView logits;
  std::int64_t elements, memory;
  const DistillCall call = parse_distill(item, logits, elements);
  const Optional<double> workspace = parse_workspace(item[kDistillArguments], memory);
  if (workspace.present && memory < cuda::kDistillWorkspace) throw py::value_error("too small a workspace");
  void* const stream = PyLong_AsVoidPtr(item[kDistillArguments + 1]);
  if (PyErr_Occurred()) throw py::error_already_set();
  cuda::distill(call, workspace, logits.gpu(), stream);
}

}  // namespace

void bind_cuda_distill(py::module_& module) {
  module.attr("distill_workspace") = cuda::kDistillWorkspace;
  module.def("distill", distill);
}

}  // namespace fedkern
