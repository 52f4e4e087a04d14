// fedkern._cuda: the compiled CUDA kernels. Imports without a driver; a call then says what is missing.
#include "bindings.h"

namespace fedkern {

void bind_cuda_aggregate(py::module_&);
void bind_cuda_blend(py::module_&);
void bind_cuda_contrast(py::module_&);
void bind_cuda_distill(py::module_&);
void bind_cuda_distill_ensemble(py::module_&);
void bind_cuda_fuse(py::module_&);

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of fedkern; use them through fedkern.ops.";
  module.def("source_hash", [] { return FEDKERN_SOURCE_HASH; });
  bind_cuda_aggregate(module);
  bind_cuda_blend(module);
  bind_cuda_contrast(module);
  bind_cuda_distill(module);
  bind_cuda_distill_ensemble(module);
  bind_cuda_fuse(module);
}

}  // namespace fedkern
