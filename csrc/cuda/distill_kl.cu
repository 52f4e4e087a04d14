// distill on CUDA: the divergence of one student.
#include "distill_run.cuh"

namespace fedkern::cuda {

void distill_kl(const DistillCall& a, const Optional<double>& workspace, const Queue& queue) {
  a.compute == DType::f64 ? run_as<OneDivergence, double, false>(a, workspace, queue) : run_as<OneDivergence, float, true>(a, workspace, queue);
}

}  // namespace fedkern::cuda
