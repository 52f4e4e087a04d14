// A student against the mixture of K teachers' logits, which is never stored: its classes are added up anew in every pass.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

// The teachers' mixed logit of a class: -infinity where a teacher that counts has that. `centered`: without every
// teacher's mean over the classes, which kMaximum holds.
static __device__ __noinline__ double mixed_logit(const EnsembleCall& a, std::int64_t teachers, std::int64_t weights, const double* slot,
                                                  std::int64_t step, std::int64_t c, double sum, bool centered) {
  const int K = static_cast<int>(a.count);
  const auto number = [&](int name, int k) { return slot[(static_cast<std::int64_t>(name) * K + k) * step]; };
  double z = 0;
  bool masked = false;
#pragma unroll 2
  for (int k = 0; k < K; ++k) {
    const double x = load_value<double>(a.teachers.data, a.teachers.dtype, teachers + k * a.teachers.stack_stride + c * a.teachers.class_stride);
    const double w = !a.by_class ? number(kShare, k) : sum == 0 ? 1.0 / K : weight_of(a, weights, k, c) / sum;
    z = w == 0 ? z : fma(w, centered ? x - number(kMaximum, k) : x, z);
    masked = masked || (w > 0 && x == -infinity<double>());
  }
  return masked ? -infinity<double>() : z;
}

// What mixtures of logits have in common: the mixture, and how its gradient spreads.
template <typename C, int Lanes>
class MixedRow : protected TeacherRow<C, Lanes> {
 protected:
  using Base = TeacherRow<C, Lanes>;
  using Base::Base;

  __device__ __forceinline__ double mixed(std::int64_t c, double sum) const {
    return mixed_logit(this->a_, this->at_.teachers, this->at_.weights, this->slot_, this->step_, c, sum, centered_);
  }

  // From the gradient g of the mixed logit z of class c to those of teachers and weights; kDot adds up those of weights per row.
  // Where teachers are centred, kLogSum is what that takes from every class that they know.
  __device__ __forceinline__ void spread(std::int64_t c, bool mine, double sum, double z, C g) {
    const EnsembleCall& a = this->a_;
    for (int k = 0; k < this->K_; ++k) {
      const C w = this->share(k, c, sum), x = this->teacher(k, c);
      if (a.teachers_grad.present && mine) {
        const C off = centered_ && x > -infinity<C>() ? this->number(kLogSum, k) : C(0);
        this->to_teacher(k, c, (w * g - off) * static_cast<C>(this->factors_[0]));
      }
      if (!a.weights_grad.present) continue;
      const double from = static_cast<double>(x) - (centered_ ? this->exactly(kMaximum, k) : 0.0);
      const double value = g == C(0) || w == C(0) ? 0.0 : static_cast<double>(g) * (from - z);
      if (!a.by_class)
        this->add_dot(k, mine ? value : 0.0);
      else if (mine)
        this->to_weight(k, c, sum == 0 || w == C(0) ? 0.0 : value * this->factors_[0] / sum);
    }
  }

  bool centered_ = false;
};

// T^2 KL(P || Q), P the softmax of the mixed logits.
template <typename C, int Lanes>
class LogitsRow : MixedRow<C, Lanes> {
  using Base = MixedRow<C, Lanes>;
  using typename Base::G;
  using Base::a_, Base::factors_, Base::inverse_t_, Base::mixed, Base::student, Base::sum_at, Base::temperature_;

 public:
  static constexpr bool kExact = false;

  __device__ LogitsRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.temperature) {}

  // Finds the loss, and writes the gradients that are wanted; fp32 always does.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    Softmax<C> p, q;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const C z[1] = {static_cast<C>(mixed(c, sum_at(c)))}, y[1] = {student(c)};
      p.template add<1>(z, inverse_t_), q.template add<1>(y, inverse_t_);
    }
    p.template gather<G>(inverse_t_), q.template gather<G>(inverse_t_);
    const Pair<C> pair(p, q);
    this->find_factors();
    double value = 0, drift = 0;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const Term<C> term(pair, static_cast<C>(mixed(c, sum_at(c))), student(c), inverse_t_);
      value += static_cast<double>(term.value), drift += static_cast<double>(term.difference);
      if (a_.student_grad.present) this->to_student(c, term.difference * static_cast<C>(factors_[0]));
    }
    const double kl = settled(G::sum(value), G::sum(drift));
    loss[0] = kl * temperature_ * temperature_;
    if (!this->wants_late()) return true;
    this->clear_dots();
    this->each_chunk([&](std::int64_t c, bool mine) {
      const double sum = sum_at(c), z = mixed(c, sum);
      const Term<C> term(pair, static_cast<C>(z), student(c), inverse_t_);
      this->spread(c, mine, sum, z, term.toward_p(static_cast<C>(kl)));
    });
    this->gather_dots();
    this->weight_gradients(factors_[0]);
    return true;
  }
};

}  // namespace fedkern::cuda
