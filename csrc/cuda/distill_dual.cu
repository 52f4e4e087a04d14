// distill on CUDA: the divergence of two students from one teacher.
#include "distill_run.cuh"

namespace fedkern::cuda {

void distill_dual(const DistillCall& a, const Optional<double>& workspace, const Queue& queue) {
  a.compute == DType::f64 ? run_as<TwoDivergences, double, false>(a, workspace, queue) : run_as<TwoDivergences, float, true>(a, workspace, queue);
}

}  // namespace fedkern::cuda
