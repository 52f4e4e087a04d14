// The mean of the divergences of a student from K teachers.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

template <typename C, int Lanes>
class MeanRow : TeacherRow<C, Lanes> {
  using Base = TeacherRow<C, Lanes>;
  using typename Base::G;
  using Base::a_, Base::exactly, Base::factors_, Base::inverse_t_, Base::K_, Base::keep, Base::number, Base::student, Base::student_;
  using Base::student_inverse_, Base::teacher, Base::temperature_;

 public:
  static constexpr bool kExact = false;  // fp32 does where it is asked for

  __device__ MeanRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.temperature) {}

  // Finds the loss, and writes the gradients that are wanted; fp32 always does.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    this->find_student();
    this->find_factors();
    double mean = 0, excess = 0;
    for (int k = 0; k < K_; ++k) {
      const double w = exactly(kShare, k);
      if (w == 0) continue;
      double mass;
      mean += w * divergence(k, mass), excess += w * (mass - 1);
    }
    this->together();
    loss[0] = mean * temperature_ * temperature_;
    if (a_.student_grad.present || a_.teachers_grad.present) write_gradients(static_cast<C>(excess));
    this->weight_gradients(factors_[0] * temperature_);
    return true;
  }

 private:
  // KL(p_k || student), and what is needed to take it apart again. `mass`: the sum of p_k, which of log-probabilities taken
  // as they are need not be 1.
  __device__ __forceinline__ double divergence(int k, double& mass) {
    Softmax<C> soft;
    if (a_.as_is) {
      soft.maximum = 0, soft.sum = 1;
    } else {
      for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
        const C x[1] = {teacher(k, c)};
        soft.template add<1>(x, inverse_t_);
      }
      soft.template gather<G>(inverse_t_);
    }
    const Pair<C> pair(soft, student_);
    double value = 0, drift = 0, sum = 0;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const Term<C> term(pair, teacher(k, c), student(c), inverse_t_);
      value += static_cast<double>(term.value), drift += static_cast<double>(term.difference), sum += static_cast<double>(term.p);
    }
    value = G::sum(value), drift = G::sum(drift);
    mass = a_.as_is ? G::sum(sum) : 1.0;
    const double kl = settled(value, a_.as_is ? 0.0 : drift);
    keep(kMaximum, k, static_cast<double>(pair.maximum_p())), keep(kInverse, k, static_cast<double>(pair.inverse_p));
    keep(kLogSum, k, static_cast<double>(pair.log_ratio)), keep(kDot, k, kl);
    return kl;
  }

  __device__ __forceinline__ void write_gradients(C excess) const {
    const C factor = static_cast<C>(factors_[0]);
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const C y = student(c);
      C toward = excess * exponential((y - student_.maximum) * inverse_t_) * student_inverse_;
      for (int k = 0; k < K_; ++k) {
        const C w = number(kShare, k);
        C value = 0;
        if (w != C(0)) {
          const Pair<C> pair(number(kMaximum, k), student_.maximum, number(kInverse, k), student_inverse_, number(kLogSum, k));
          const Term<C> term(pair, teacher(k, c), y, inverse_t_);
          toward += w * term.difference;
          value = w * factor * term.toward_p(a_.as_is ? C(0) : number(kDot, k));
        }
        if (a_.teachers_grad.present) this->to_teacher(k, c, value);
      }
      if (a_.student_grad.present) this->to_student(c, toward * factor);
    }
  }
};

}  // namespace fedkern::cuda
