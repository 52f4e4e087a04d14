// Which kernel runs a call. Rows are walked in distill_walk.h; the arithmetic is in distill_losses.h, blocks in
// distill_block.h, loading and storing in distill_memory.h.
#include "fedkern/distill.h"

#include "distill_losses.h"
#include "distill_walk.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T>
void run_as(const DistillCall& call) {
  bool dense = call.teacher.class_stride == 1;
  for (int k = 0; k < call.students; ++k) dense = dense && call.student[k].class_stride == 1;
  const Sums sums = walk<T, Losses>(call, dense, 1 + call.students);
  if (call.total.present) store_scalar(call.total.dtype, call.total.data, 0, sums.value[0] * call.scale);
}

void run(const DistillCall& call) { call.compute == DType::f64 ? run_as<double>(call) : run_as<float>(call); }

template <typename T, typename Power>
void map(std::int64_t count, const void* in, void* out, Power power) {
  for (std::int64_t i = 0; i < count; i += Vec<T>::lanes) {
    const std::ptrdiff_t n = count - i < Vec<T>::lanes ? count - i : Vec<T>::lanes;
    power(Vec<T>::load_partial(static_cast<const T*>(in) + i, n)).store_partial(static_cast<T*>(out) + i, n);
  }
}

void exp_of(DType dtype, std::int64_t count, const void* in, void* out) {
  const auto power = [](auto x) { return exp(x); };
  dtype == DType::f64 ? map<double>(count, in, out, power) : map<float>(count, in, out, power);
}

void scaled_exp_of(DType dtype, std::int64_t count, const void* in, void* out, double temperature) {
  dtype == DType::f64 ? map<double>(count, in, out, ScaledExp<double>(temperature))
                      : map<float>(count, in, out, ScaledExp<float>(temperature));
}

}  // namespace

const DistillTable distill_table = {run, exp_of, scaled_exp_of};

}  // namespace fedkern::FEDKERN_ISA
