// distill on CUDA: the divergence of one student.
#include <utility>

#include "distill_run.cuh"

namespace fedkern::cuda {

void distill_kl(const DistillCall& a, const Optional<double>& workspace, const Queue& queue) {
  DistillCall call = a;
  // KL(student || teacher) is the teacher's divergence from the student: kernels of one student know one direction.
  if (a.reverse) std::swap(call.teacher, call.student[0]), std::swap(call.teacher_grad, call.student_grad[0]), call.reverse = false;
  a.compute == DType::f64 ? run_as<OneDivergence, double, false>(call, workspace, queue) : run_as<OneDivergence, float, true>(call, workspace, queue);
}

}  // namespace fedkern::cuda
