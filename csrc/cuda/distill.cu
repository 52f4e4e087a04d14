// distill on CUDA: entropy, and the limit T = infinity. Other losses have files of their own, so that nvcc works on them side
// by side.
#include "distill_run.cuh"

namespace fedkern::cuda {

void distill(const DistillCall& a, const Optional<double>& workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const bool f64 = a.compute == DType::f64;
  switch (a.kind) {
    case DistillKind::kl: return a.students == 1 ? distill_kl(a, workspace, queue) : distill_dual(a, workspace, queue);
    case DistillKind::limit: return f64 ? run_as<Limit, double, false>(a, workspace, queue) : run_as<Limit, float, false>(a, workspace, queue);
    case DistillKind::entropy: return f64 ? run_as<Entropy, double, false>(a, workspace, queue) : run_as<Entropy, float, true>(a, workspace, queue);
  }
}

}  // namespace fedkern::cuda
