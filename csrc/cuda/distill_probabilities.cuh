// Losses against the mixture of K teachers' probabilities (probs, js, consensus), with the formulas of distill_ensemble.h.
// Where distributions nearly agree a mixture in fp32 loses the digits of the divergence: such rows are done again in fp64.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

// Divergences (in units of T^2) below this are done again in fp64.
inline constexpr double kNear = 0.01;

template <typename C, int Lanes>
class ProbabilityRow : TeacherRow<C, Lanes> {
  using Base = TeacherRow<C, Lanes>;
  using typename Base::G;
  using Base::a_, Base::add_dot, Base::at_, Base::clear_dots, Base::each_chunk, Base::exactly, Base::factors_, Base::gather_dots;
  using Base::inverse_t_, Base::K_, Base::keep, Base::kParts, Base::number, Base::share, Base::skipped, Base::slot_, Base::step_;
  using Base::student, Base::student_, Base::student_inverse_, Base::student_log_sum_, Base::sum_at, Base::teacher;
  using Base::temperature_, Base::to_student, Base::to_teacher, Base::to_weight, Base::together, Base::weight;
  // The mixture's mass that probabilities can be divided by, and their products with gradients taken.
  static constexpr double kFaint = sizeof(C) == 8 ? 1e-200 : 1e-20;

 public:
  static constexpr bool kExact = false;  // fp32 does where it is asked for

  __device__ ProbabilityRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.kind == EnsembleKind::probs ? a.temperature : 1.0),
        probs_(a.kind == EnsembleKind::probs), js_(a.kind == EnsembleKind::js) {}

  // Finds the losses, and writes the gradients that are wanted; false where fp32 does not do.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    find_softmaxes();
    if (probs_) this->find_student();
    if (probs_ && (a_.by_class || a_.as_is)) {  // the mixture does not sum to 1
      double sum = mass();
      // Masks and weights by class may leave so little that probabilities underflow, log-probabilities hold so much.
      if (!(sum > kFaint && sum < 1 / kFaint)) find_lift(), sum = mass();
      normaliser_ = static_cast<C>(1 / sum), log_normaliser_ = logarithm(static_cast<C>(sum));
    }
    this->find_factors();
    if (!find_losses(loss)) return false;
    if (!this->wants_late()) return true;
    find_dots();
    write_gradients();
    this->weight_gradients(probs_ ? factors_[0] * temperature_ : js_ ? factors_[0] : 1.0);
    return true;
  }

 private:
  // Maxima and sums of exponentials of all teachers.
  __device__ void find_softmaxes() {
    for (int k = 0; k < K_; ++k) {
      if (a_.as_is) {
        keep(kMaximum, k, 0), keep(kInverse, k, 1), keep(kLogSum, k, 0);
        continue;
      }
      Softmax<C> soft;
      if (a_.by_class || number(kShare, k) != 0)
        for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
          const C x[1] = {teacher(k, c)};
          soft.template add<1>(x, inverse_t_);
        }
      soft.template gather<G>(inverse_t_);
      keep(kMaximum, k, static_cast<double>(soft.maximum)), keep(kInverse, k, 1 / soft.sum);
      keep(kLogSum, k, static_cast<double>(logarithm(static_cast<C>(soft.sum))));
    }
    together();
  }
  __device__ __forceinline__ C power(int k, C x) const { return exponential((x - number(kMaximum, k)) * inverse_t_) * number(kInverse, k); }
  __device__ __forceinline__ C log_power(int k, C x) const { return (x - number(kMaximum, k)) * inverse_t_ - number(kLogSum, k); }

  __device__ __forceinline__ C mix(std::int64_t c, double sum) const {
    return mixture<C>(a_, at_.teachers, at_.weights, slot_, step_, c, sum, lift_);
  }
  __device__ double mass() const {
    double sum = 0;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) sum += static_cast<double>(mix(c, sum_at(c)));
    return G::sum(sum);
  }
  // lift_: the logarithm of the largest p that counts; 0 where none does.
  __device__ __forceinline__ void find_lift() {
    C most = -infinity<C>();
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const C value = largest_logarithm<C>(a_, at_.teachers, at_.weights, slot_, step_, c, sum_at(c));
      most = value > most ? value : most;
    }
    lift_ = Softmax<C>::reference(G::maximum(most));
  }
  // A p that counts, over e^lift as the mixture is.
  __device__ __forceinline__ C lifted(int k, C x) const { return lift_ == C(0) ? power(k, x) : exponential(log_power(k, x) - lift_); }
  __device__ __forceinline__ static C log_of(C m) {
    constexpr C tiny = static_cast<C>(sizeof(C) == 8 ? 1e-300 : 1e-37);  // normal numbers
    return logarithm(m > tiny || m != m ? m : tiny);
  }

  // log of the student's probability over the mixture's, at a class where that is m before it is renormalised.
  __device__ __forceinline__ C log_ratio(C student, C m) const {
    return (student - student_.maximum) * inverse_t_ - student_log_sum_ - log_of(m) + log_normaliser_;
  }

  // The losses, the student's gradient, and in kDot: js KL(p_k || mixture), consensus the entropy of p_k.
  __device__ __forceinline__ bool find_losses(double (&loss)[2]) {
    double first = 0, drift = 0;
    if (!probs_) clear_dots();
    each_chunk([&](std::int64_t c, bool mine) {
      const C m = mix(c, sum_at(c));
      if (!probs_) {
        const C log_m = log_of(m);
        if (mine) first -= static_cast<double>(m * log_m);
        for (int k = 0; k < K_; ++k) {
          const C x = teacher(k, c), p = skipped(k) ? C(0) : power(k, x);
          C value = p > C(0) ? p * (number(kMaximum, k) - x + number(kLogSum, k)) : p;
          if (js_) value = skipped(k) ? C(0) : MixtureTerm<C>(p, m, log_m - log_power(k, x)).value;
          add_dot(k, mine ? static_cast<double>(value) : 0.0);
        }
      } else if (mine) {
        const C x = student(c), q = exponential((x - student_.maximum) * inverse_t_) * student_inverse_;
        const MixtureTerm<C> term(m * normaliser_, q, log_ratio(x, m));
        first += static_cast<double>(term.value), drift += static_cast<double>(term.difference);
        if (a_.student_grad.present) to_student(c, term.difference * static_cast<C>(factors_[0]));
      }
    });
    first = G::sum(first);
    if (probs_) {
      kl_ = settled(first, G::sum(drift));
      loss[0] = kl_ * temperature_ * temperature_;
      return !too_near(kl_);
    }
    gather_dots();
    double mean = 0;
    for (int k = 0; k < K_; ++k) {
      const double own = exactly(kDot, k);
      mean += skipped(k) ? 0.0 : exactly(kShare, k) * (own < 0 ? 0.0 : own);
    }
    if (js_) {
      const double most = static_cast<double>(logarithm(static_cast<double>(K_)));
      loss[0] = mean > most ? most : mean;
      return !too_near(mean);
    }
    loss[0] = first < 0 ? 0 : first, loss[1] = mean;
    return true;
  }

  // What the gradients toward the classes of teacher k have in common (probs and consensus: sum p times the derivative toward
  // p; js: it is there), toward its share the derivative itself.
  __device__ __forceinline__ void find_dots() {
    if (js_) return;
    if (probs_) {
      clear_dots();
    } else {
      together();
      for (int k = G::lane(); k < K_; k += Lanes) {
        const double own = skipped(k) ? 0.0 : factors_[1] * exactly(kDot, k);
        for (int part = 0; part < kParts; ++part) slot_[(static_cast<std::int64_t>(kDot + part) * K_ + k) * step_] = part ? 0.0 : own;
      }
      together();
    }
    each_chunk([&](std::int64_t c, bool mine) {
      const double sum = sum_at(c);
      const C center = toward_mixture(c, mix(c, sum));
      for (int k = 0; k < K_; ++k) {
        const C inner = skipped(k) ? C(0) : weighted(k, c, sum, center), p = inner == C(0) ? C(0) : lifted(k, teacher(k, c));
        add_dot(k, mine && p != C(0) ? static_cast<double>(p * inner) : 0.0);
      }
    });
    gather_dots();
  }

  // The derivative toward the mixture's probability of a class: but for what is the same for all classes.
  __device__ __forceinline__ C toward_mixture(std::int64_t c, C m) const {
    if (probs_) return m > C(0) ? -normaliser_ * (log_ratio(student(c), m) + static_cast<C>(kl_)) : C(0);
    return (js_ ? C(1) : -static_cast<C>(factors_[0])) * log_of(m);
  }
  __device__ __forceinline__ C weighted(int k, std::int64_t c, double sum, C center) const {
    if (!a_.by_class) return center;
    const C w = share(k, c, sum);
    return w == C(0) ? C(0) : w * center;
  }

  // The gradient toward a teacher's class of probability p, `own` = w g of it: p (w g - sum p w g), where
  // log-probabilities are given p w g. A teacher that nowhere counts may hold anything.
  __device__ __forceinline__ C toward_teacher(int k, C x, C p, C own) const {
    const C dot = a_.as_is ? C(0) : number(kDot, k), inner = own - dot;
    if (lift_ == C(0)) return inner == C(0) ? C(0) : p * inner;
    // Where the teacher counts nothing its p may be as much above the mixture as numbers go: dot takes it plain.
    return (own == C(0) ? own : lifted(k, x) * own) - (dot == C(0) ? dot : p * dot);
  }

  __device__ __forceinline__ void write_gradients() const {
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const double sum = sum_at(c);
      const C m = mix(c, sum), center = toward_mixture(c, m);
      for (int k = 0; k < K_; ++k) {
        const C x = teacher(k, c), p = skipped(k) ? C(0) : power(k, x), outer = a_.by_class ? C(1) : number(kShare, k);
        if (a_.teachers_grad.present) {
          C value;
          if (probs_) {
            value = toward_teacher(k, x, p, weighted(k, c, sum, center)) * static_cast<C>(factors_[0]);
          } else if (js_) {  // -p (log mixture - log p + KL)
            value = -p * (center - log_power(k, x) + number(kDot, k)) * static_cast<C>(factors_[0]);
          } else {  // p (g (-log mixture - cross entropy) + h (-log p - entropy))
            value = p * (center - static_cast<C>(factors_[1]) * log_power(k, x) - number(kDot, k));
          }
          const bool gone = p == C(0) && lift_ == C(0);  // lifted, what counts may underflow and yet be the mixture
          to_teacher(k, c, gone || outer == C(0) ? C(0) : outer * value);
        }
        if (a_.weights_grad.present && a_.by_class) {
          const double difference = static_cast<double>(lift_ == C(0) ? p : lifted(k, x)) - static_cast<double>(m);
          const double toward = factors_[0] * temperature_ * static_cast<double>(center) * difference;
          to_weight(k, c, sum == 0 || weight(k, c) == 0 ? 0.0 : toward / sum);
        }
      }
    }
  }
  __device__ __forceinline__ static bool too_near(double loss) { return sizeof(C) == 4 && loss < kNear; }

  const bool probs_, js_;
  double kl_ = 0;
  C lift_ = 0;  // not 0 where the mixture's probabilities would underflow or overflow: the logarithm they are over
  C normaliser_ = 1, log_normaliser_ = 0;  // of the mixture: one over its sum, the sum's logarithm
};

}  // namespace fedkern::cuda
