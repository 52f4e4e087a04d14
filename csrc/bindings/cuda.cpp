// fedkern._cuda: the compiled CUDA kernels. Imports without a driver; a call then says what is missing.
#include "exchange.h"
#include "fedkern/device_cuda.h"

namespace fedkern {

void bind_cuda_aggregate(py::module_&);
void bind_cuda_blend(py::module_&);
void bind_cuda_contrast(py::module_&);
void bind_cuda_distill(py::module_&);
void bind_cuda_distill_ensemble(py::module_&);
void bind_cuda_fuse(py::module_&);
void bind_cuda_optimise(py::module_&);

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of fedkern; use them through fedkern.ops.";
  module.def("take_tensors", take_tensors);
  module.def("source_hash", [] { return FEDKERN_SOURCE_HASH; });
  module.def("architectures", &cuda::architectures, "Compute capabilities that kernels were compiled for, 90 for 9.0.");
  module.def("versions", &cuda::versions, "CUDA versions of the runtime and the driver, 13000 for 13.0; 0 without a driver.");
  bind_cuda_aggregate(module);
  bind_cuda_blend(module);
  bind_cuda_contrast(module);
  bind_cuda_distill(module);
  bind_cuda_distill_ensemble(module);
  bind_cuda_fuse(module);
  bind_cuda_optimise(module);
}

}  // namespace fedkern
