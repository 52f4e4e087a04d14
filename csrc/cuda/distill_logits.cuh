// A student against the mixture of K teachers' logits, which is never stored: its classes are added up anew in every pass.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

// What mixtures of logits have in common: the mixture, and how its gradient spreads.
template <typename C, int Lanes, typename T>
class MixedRow : protected TeacherRow<C, Lanes, T> {
 protected:
  using Base = TeacherRow<C, Lanes, T>;
  using typename Base::Part;
  using Base::Base, Base::N;

  // The mixed logits of a part's classes: -infinity where a teacher that counts has that. Where teachers are `centered`,
  // without their means over the classes, which kMaximum holds.
  __device__ __forceinline__ void mix(const Part& part, const double (&sum)[N], C (&z)[N]) const {
    bool masked[N];
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = 0, masked[i] = !part.holds(i);
    this->each_few([&](auto few, int first) {
      constexpr int J = decltype(few)::value;
      C x[J][N], w[J][N];
#pragma unroll
      for (int j = 0; j < J; ++j) this->load_teacher(first + j, part, x[j]), this->find_shares(first + j, part, sum, w[j]);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const C center = centered_ ? this->number(kMaximum, first + j) : C(0);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          z[i] = fma(w[j][i], w[j][i] == C(0) ? C(0) : x[j][i] - center, z[i]);
          masked[i] = masked[i] || (w[j][i] > C(0) && x[j][i] == -infinity<C>());
        }
      }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = masked[i] ? -infinity<C>() : z[i];
  }

  // From the gradients g of the mixed logits z to those of teachers and weights; kDot adds up those of weights per row.
  // Where teachers are centred, kLogSum is what that takes from every class that they know.
  __device__ __forceinline__ void spread(const Part& part, const double (&sum)[N], const C (&z)[N], const C (&g)[N]) {
    const EnsembleCall& a = this->a_;
#pragma unroll 1
    for (int k = 0; k < this->K_; ++k) {
      C x[N], w[N], dot = 0;
      this->load_teacher(k, part, x);
      this->find_shares(k, part, sum, w);
      const C center = centered_ ? this->number(kMaximum, k) : C(0), off = centered_ ? this->number(kLogSum, k) : C(0);
      if (a.weights_grad.present) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C value = g[i] == C(0) || w[i] == C(0) ? C(0) : g[i] * (x[i] - center - z[i]);
          dot += value;
          if (this->by_class() && part.holds(i))
            this->to_weight(k, this->class_of(part, i), sum[i] == 0 || w[i] == C(0) ? 0.0 : static_cast<double>(value) * this->factors_[0] / sum[i]);
        }
        if (!this->by_class()) this->add_dot(k, dot);
      }
      if (!a.teachers_grad.present) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = (w[i] * g[i] - (x[i] > -infinity<C>() ? off : C(0))) * static_cast<C>(this->factors_[0]);
      this->to_teacher(k, part, x);
    }
  }

  bool centered_ = false;
};

// T^2 KL(P || Q), P the softmax of the mixed logits.
template <typename C, int Lanes, typename T>
class LogitsRow : MixedRow<C, Lanes, T> {
  using Base = MixedRow<C, Lanes, T>;
  using typename Base::Base::G;
  using typename Base::Part;
  using Base::a_, Base::factors_, Base::find_sums, Base::inverse_t_, Base::load_student, Base::mix, Base::N, Base::temperature_;

 public:
  static constexpr bool kExact = false, kSure = true;

  __device__ LogitsRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.temperature) {}

  // Finds the loss, and writes the gradients that are wanted; fp32 always does.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    Softmax<C> p, q;
    this->each_part([&](const Part& part) {
      double sum[N];
      C z[N], y[N];
      find_sums(part, sum), load_student(part, y), mix(part, sum, z);
      p.template add<N>(z, inverse_t_), q.template add<N>(y, inverse_t_);
    });
    p.template gather<G>(inverse_t_), q.template gather<G>(inverse_t_);
    const Pair<C> pair(p, q);
    this->find_factors();
    double value = 0, drift = 0;
    this->template each_part<true>([&](const Part& part) {
      double sum[N];
      C z[N], y[N], values = 0, differences = 0;
      find_sums(part, sum), load_student(part, y), mix(part, sum, z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Term<C> term(pair, z[i], y[i], inverse_t_);
        values += term.value, differences += term.difference;
        y[i] = term.difference * static_cast<C>(factors_[0]);
      }
      value += static_cast<double>(values), drift += static_cast<double>(differences);
      if (a_.student_grad.present) this->to_student(part, y);
    });
    const double kl = settled(G::sum(value), G::sum(drift));
    loss[0] = kl * temperature_ * temperature_;
    if (!this->wants_late()) return true;
    this->clear_dots();
    this->each_part([&](const Part& part) {
      double sum[N];
      C z[N], y[N];
      find_sums(part, sum), load_student(part, y), mix(part, sum, z);
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = Term<C>(pair, z[i], y[i], inverse_t_).toward_p(static_cast<C>(kl));
      this->spread(part, sum, z, y);
    });
    this->gather_dots();
    this->weight_gradients(factors_[0]);
    return true;
  }
};

}  // namespace fedkern::cuda
