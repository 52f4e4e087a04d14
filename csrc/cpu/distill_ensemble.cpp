// Which kernel runs a call on K teachers. Rows are walked in distill_walk.h; lines and statistics are in
// distill_storage.h and distill_lines.h, the losses in distill_consensus.h, distill_limits.h,
// distill_probabilities.h and distill_mixtures.h.
#include "fedkern/distill_ensemble.h"

#include "distill_mixtures.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T>
void run_as(const EnsembleCall& call) {
  const bool dense = call.teachers.class_stride == 1 && (!call.student.present || call.student.class_stride == 1);
  const Sums sums = walk<T, EnsembleLosses>(call, dense, call.count);
  for (int i = 0; i < 2; ++i)
    if (call.total[i].present) store_scalar(call.total[i].dtype, call.total[i].data, 0, sums.value[i] * call.scale);
}

void run(const EnsembleCall& call) { call.compute == DType::f64 ? run_as<double>(call) : run_as<float>(call); }

}  // namespace

const EnsembleTable distill_ensemble_table = {run};

}  // namespace fedkern::FEDKERN_ISA
