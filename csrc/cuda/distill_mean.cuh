// The mean of the divergences of a student from K teachers.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

template <typename C, int Lanes, typename T>
class MeanRow : TeacherRow<C, Lanes, T> {
  using Base = TeacherRow<C, Lanes, T>;
  using typename Base::G;
  using typename Base::Part;
  using Base::a_, Base::exactly, Base::factors_, Base::inverse_t_, Base::K_, Base::keep, Base::kTogether, Base::load_student;
  using Base::load_teacher, Base::N, Base::number, Base::student_, Base::student_inverse_, Base::temperature_;

 public:
  static constexpr bool kExact = false, kSure = true;

  __device__ MeanRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.temperature) {}

  // Finds the loss, and writes the gradients that are wanted; fp32 always does.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    this->find_student();
    this->find_factors();
    const auto keep_pair = [&](int k, const Softmax<C>& soft) {
      const Pair<C> pair(soft, student_);
      keep(kMaximum, k, pair.maximum_p()), keep(kInverse, k, pair.inverse_p), keep(kLogSum, k, pair.log_ratio);
    };
    if (a_.as_is) {
      Softmax<C> known;
      known.maximum = 0, known.sum = 1;
      for (int k = 0; k < K_; ++k) keep_pair(k, known);
      this->together();
    } else {
      this->each_softmax(keep_pair);
    }
    double mean = 0, excess = 0;
    this->each_few([&](auto few, int first) { add_divergences<decltype(few)::value>(first, mean, excess); });
    this->together();
    loss[0] = mean * temperature_ * temperature_;
    if (a_.teachers_grad.present || (a_.student_grad.present && !at_once())) write_gradients(static_cast<C>(excess));
    this->weight_gradients(factors_[0] * temperature_);
    return true;
  }

 private:
  // True where the student's gradient is known as soon as all teachers' terms of a class are: of one call of each_few.
  __device__ __forceinline__ bool at_once() const { return (K_ < 3 || K_ == kTogether) && K_ <= kTogether && !a_.as_is; }
  __device__ __forceinline__ Pair<C> pair_of(int k) const {
    return {number(kMaximum, k), student_.maximum, number(kInverse, k), student_inverse_, number(kLogSum, k)};
  }

  // Adds up w KL(p_k || student) of J teachers, and w (sum of p_k - 1): log-probabilities taken as they are need not sum to 1.
  template <int J>
  __device__ __forceinline__ void add_divergences(int first, double& mean, double& excess) const {
    const bool to_student = a_.student_grad.present && at_once();
    const C factor = static_cast<C>(factors_[0]);
    double value[J] = {}, drift[J] = {}, mass[J] = {};
    this->template each_part<true>([&](const Part& part) {
      C y[N], toward[N] = {};
      load_student(part, y);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const C w = number(kShare, first + j);
        if (w == C(0)) continue;
        const Pair<C> pair = pair_of(first + j);
        C x[N], sum = 0, difference = 0, p = 0;
        load_teacher(first + j, part, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const Term<C> term(pair, x[i], y[i], inverse_t_);
          sum += term.value, difference += term.difference, p += term.p;
          toward[i] += w * term.difference;
        }
        value[j] += static_cast<double>(sum), drift[j] += static_cast<double>(difference), mass[j] += static_cast<double>(p);
      }
      if (!to_student) return;
#pragma unroll
      for (C& t : toward) t *= factor;
      this->to_student(part, toward);
    });
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const double w = exactly(kWeight, first + j);
      value[j] = G::sum(value[j]), drift[j] = G::sum(drift[j]), mass[j] = a_.as_is ? G::sum(mass[j]) : 1.0;
      const double kl = w == 0 ? 0.0 : settled(value[j], a_.as_is ? 0.0 : drift[j]);
      this->keep_exactly(kDot, first + j, kl);
      mean += w * kl, excess += w == 0 ? 0.0 : w * (mass[j] - 1);
    }
  }

  __device__ __forceinline__ void write_gradients(C excess) const {
    const C factor = static_cast<C>(factors_[0]);
    this->each_part([&](const Part& part) {
      C y[N], toward[N];
      load_student(part, y);
#pragma unroll
      for (int i = 0; i < N; ++i) toward[i] = excess * exponential((y[i] - student_.maximum) * inverse_t_) * student_inverse_;
#pragma unroll 1
      for (int k = 0; k < K_; ++k) {
        const C w = number(kShare, k), kl = a_.as_is ? C(0) : static_cast<C>(exactly(kDot, k));
        const Pair<C> pair = pair_of(k);
        C x[N];
        load_teacher(k, part, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const Term<C> term(pair, x[i], y[i], inverse_t_);
          toward[i] += w == C(0) ? w : w * term.difference;
          x[i] = w == C(0) ? w : w * factor * term.toward_p(kl);
        }
        if (a_.teachers_grad.present) this->to_teacher(k, part, x);
      }
      if (!a_.student_grad.present) return;
#pragma unroll
      for (C& t : toward) t *= factor;
      this->to_student(part, toward);
    });
  }
};

}  // namespace fedkern::cuda
