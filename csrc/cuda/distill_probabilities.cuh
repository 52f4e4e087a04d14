// Losses against the mixture of K teachers' probabilities (probs, js, consensus), with the formulas of distill_ensemble.h.
// Where distributions nearly agree a mixture in fp32 loses the digits of the divergence: such rows are done again in fp64.
#pragma once

#include "distill_teachers.cuh"

namespace fedkern::cuda {

// Divergences (in units of T^2) below this are done again in fp64.
inline constexpr double kNear = 0.01;

template <typename C, int Lanes, typename T>
class ProbabilityRow : TeacherRow<C, Lanes, T> {
  using Base = TeacherRow<C, Lanes, T>;
  using typename Base::G;
  using typename Base::Part;
  using Base::a_, Base::add_dot, Base::at_, Base::by_class, Base::clear_dots, Base::exactly, Base::factors_, Base::find_sums, Base::gather_dots;
  using Base::inverse_t_, Base::K_, Base::keep, Base::kParts, Base::load_student, Base::load_teacher, Base::N, Base::number;
  using Base::place, Base::skipped, Base::student_, Base::student_inverse_, Base::student_log_sum_, Base::temperature_, Base::together;
  // The mixture's mass that probabilities can be divided by, and their products with gradients taken.
  static constexpr double kFaint = sizeof(C) == 8 ? 1e-200 : 1e-20;

 public:
  static constexpr bool kExact = false, kSure = false;  // whether fp32 never does, and whether it always does

  __device__ ProbabilityRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step)
      : Base(a, at, slot, step, a.kind == EnsembleKind::probs ? a.temperature : 1.0),
        probs_(a.kind == EnsembleKind::probs), js_(a.kind == EnsembleKind::js) {}

  // Finds the losses, and writes the gradients that are wanted; false where fp32 does not do.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    if (probs_) this->find_student();
    const bool keeps = sizeof(C) == 4 && a_.kept.present, recalls = keeps && a_.teachers_grad.present;
    if (recalls && *kept(kDot, 0) == kUnfit) return false;
    recalls ? recall() : find_softmaxes();
    if (probs_ && (by_class() || a_.as_is)) {  // the mixture does not sum to 1
      double sum = mass();
      // Masks and weights by class may leave so little that probabilities underflow, log-probabilities hold so much.
      if (!(sum > kFaint && sum < 1 / kFaint)) find_lift(), sum = mass();
      normaliser_ = static_cast<C>(1 / sum), log_normaliser_ = logarithm(static_cast<C>(sum));
    }
    this->find_factors();
    if (!recalls) {
      const bool done = find_losses(loss);
      if (keeps) leave(done);
      if (!done) return false;
    }
    if (!this->wants_late()) return true;
    find_dots();
    write_gradients();
    this->weight_gradients(probs_ ? factors_[0] * temperature_ : js_ ? factors_[0] : 1.0);
    return true;
  }

 private:
  // Where a number of a teacher is kept, kDot after the first three, for a call that writes the gradients. A row that fp32 does not
  // do has kUnfit there, which no divergence or entropy is.
  static constexpr float kUnfit = -1;
  __device__ __forceinline__ float* kept(int name, int k) const {
    return static_cast<float*>(a_.kept.data) + at_.kept + (4 * k + (name == kDot ? 3 : name - kMaximum)) * a_.kept.class_stride;
  }
  __device__ __forceinline__ void leave(bool done) const {
    for (int k = G::lane(); k < K_; k += Lanes) {
      for (int name = kMaximum; name <= kLogSum; ++name) *kept(name, k) = static_cast<float>(number(name, k));
      *kept(kDot, k) = done ? static_cast<float>(exactly(kDot, k)) : kUnfit;
    }
  }
  __device__ __forceinline__ void recall() const {
    for (int k = G::lane(); k < K_; k += Lanes) {
      for (int name = kMaximum; name <= kLogSum; ++name) *reinterpret_cast<C*>(place(name, k)) = *kept(name, k);
      *place(kDot, k) = static_cast<double>(*kept(kDot, k));
    }
    together();
  }

  // Maxima and sums of exponentials of all teachers.
  __device__ __forceinline__ void find_softmaxes() {
    if (!a_.as_is)
      return this->each_softmax([&](int k, const Softmax<C>& soft) {
        keep(kMaximum, k, soft.maximum), keep(kInverse, k, static_cast<C>(1 / soft.sum));
        keep(kLogSum, k, logarithm(static_cast<C>(soft.sum)));
      });
    for (int k = 0; k < K_; ++k) keep(kMaximum, k, C(0)), keep(kInverse, k, C(1)), keep(kLogSum, k, C(0));
    together();
  }
  // What a teacher's probabilities are found with.
  struct Teacher {
    C maximum, inverse, log_sum;
  };
  __device__ __forceinline__ Teacher teacher(int k) const { return {number(kMaximum, k), number(kInverse, k), number(kLogSum, k)}; }
  __device__ __forceinline__ C power(const Teacher& t, C x) const { return exponential((x - t.maximum) * inverse_t_) * t.inverse; }
  __device__ __forceinline__ C log_power(const Teacher& t, C x) const { return (x - t.maximum) * inverse_t_ - t.log_sum; }
  // A p that counts, over e^lift as the mixture is.
  __device__ __forceinline__ C lifted(const Teacher& t, C x) const {
    return lift_ == C(0) ? power(t, x) : exponential(log_power(t, x) - lift_);
  }

  // The teachers' mixture, over e^lift: the sum of share times p.
  __device__ __forceinline__ void mix(const Part& part, const double (&sum)[N], C (&m)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = 0;
    this->each_few([&](auto few, int first) {
      constexpr int J = decltype(few)::value;
      C x[J][N], w[J][N];
#pragma unroll
      for (int j = 0; j < J; ++j) load_teacher(first + j, part, x[j]), this->find_shares(first + j, part, sum, w[j]);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const C maximum = number(kMaximum, first + j), inverse = number(kInverse, first + j);
        // A teacher that does not count may hold anything. Choices instead of branches let all exponentials run at a time.
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C p = exponential(w[j][i] == C(0) ? -infinity<C>() : (x[j][i] - maximum) * inverse_t_ - lift_);
          m[i] = fma(p, w[j][i] == C(0) ? C(0) : w[j][i] * inverse, m[i]);
        }
      }
    });
  }
  __device__ __forceinline__ double mass() const {
    double total = 0;
    this->each_part([&](const Part& part) {
      double sum[N];
      C m[N];
      find_sums(part, sum), mix(part, sum, m);
#pragma unroll
      for (int i = 0; i < N; ++i) total += static_cast<double>(m[i]);
    });
    return G::sum(total);
  }
  // lift_: the logarithm of the largest p that counts; 0 where none does.
  __device__ __forceinline__ void find_lift() {
    C most = -infinity<C>();
    this->each_part([&](const Part& part) {
      double sum[N];
      find_sums(part, sum);
#pragma unroll 1
      for (int k = 0; k < K_; ++k) {
        C x[N], w[N];
        load_teacher(k, part, x);
        this->find_shares(k, part, sum, w);
        const Teacher t = teacher(k);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C value = w[i] == C(0) ? -infinity<C>() : log_power(t, x[i]);
          most = value > most ? value : most;
        }
      }
    });
    lift_ = Softmax<C>::reference(G::maximum(most));
  }
  // log of the student's probability over the mixture's, at a class where that is m before it is renormalised.
  __device__ __forceinline__ C log_ratio(C student, C m) const {
    return (student - student_.maximum) * inverse_t_ - student_log_sum_ - log_of(m) + log_normaliser_;
  }

  // The losses, the student's gradient, and in kDot: js KL(p_k || mixture), consensus the entropy of p_k.
  __device__ __forceinline__ bool find_losses(double (&loss)[2]) {
    double first = 0, drift = 0;
    if (!probs_) clear_dots();
    this->template each_part<true>([&](const Part& part) {
      double sum[N];
      C m[N], value = 0, difference = 0;
      find_sums(part, sum), mix(part, sum, m);
      if (probs_) {
        C x[N];
        load_student(part, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C q = exponential((x[i] - student_.maximum) * inverse_t_) * student_inverse_;
          const Term<C> term(m[i] * normaliser_, q, log_ratio(x[i], m[i]));
          value += term.value, difference += term.difference;
          x[i] = term.difference * static_cast<C>(factors_[0]);
        }
        first += static_cast<double>(value), drift += static_cast<double>(difference);
        if (a_.student_grad.present) this->to_student(part, x);
        return;
      }
      C log_m[N];
#pragma unroll
      for (int i = 0; i < N; ++i) log_m[i] = log_of(m[i]), value -= m[i] * log_m[i];
      first += static_cast<double>(value);
#pragma unroll 1
      for (int k = 0; k < K_; ++k) {
        const Teacher t = teacher(k);
        C x[N], dot = 0;
        load_teacher(k, part, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C p = power(t, x[i]);
          if (js_)
            dot += Term<C>(p, m[i], log_m[i] - log_power(t, x[i])).value;
          else
            dot += p > C(0) ? p * (t.maximum - x[i] + t.log_sum) : p;
        }
        add_dot(k, skipped(k) ? C(0) : dot);
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
      mean += skipped(k) ? 0.0 : exactly(kWeight, k) * (own < 0 ? 0.0 : own);
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
        for (int part = 0; part < kParts; ++part) *place(kDot + part, k) = part ? 0.0 : own;
      }
      together();
    }
    this->each_part([&](const Part& part) {
      double sum[N];
      C m[N], center[N];
      find_sums(part, sum), mix(part, sum, m), find_centers(part, m, center);
#pragma unroll 1
      for (int k = 0; k < K_; ++k) {
        const Teacher t = teacher(k);
        C x[N], w[N], dot = 0;
        load_teacher(k, part, x), weigh(k, part, sum, w);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C inner = w[i] == C(0) ? C(0) : w[i] * center[i], p = inner == C(0) ? C(0) : lifted(t, x[i]);
          dot += p == C(0) ? C(0) : p * inner;
        }
        add_dot(k, skipped(k) ? C(0) : dot);
      }
    });
    gather_dots();
  }

  // The derivatives toward the mixture's probabilities of a part's classes: but for what is the same for all classes.
  __device__ __forceinline__ void find_centers(const Part& part, const C (&m)[N], C (&center)[N]) const {
    if (probs_) {
      load_student(part, center);
#pragma unroll
      for (int i = 0; i < N; ++i) center[i] = m[i] > C(0) ? -normaliser_ * (log_ratio(center[i], m[i]) + static_cast<C>(kl_)) : C(0);
    } else {
      const C factor = js_ ? C(1) : -static_cast<C>(factors_[0]);
#pragma unroll
      for (int i = 0; i < N; ++i) center[i] = factor * log_of(m[i]);
    }
  }
  // A teacher's shares as far as they differ between classes.
  __device__ __forceinline__ void weigh(int k, const Part& part, const double (&sum)[N], C (&w)[N]) const {
    this->find_shares(k, part, sum, w);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = by_class() ? w[i] : C(1);
  }

  // The gradient toward a teacher's class of probability p, `own` = w g of it: p (w g - sum p w g), where
  // log-probabilities are given p w g. A teacher that nowhere counts may hold anything.
  __device__ __forceinline__ C toward_teacher(const Teacher& t, C x, C p, C own, C dot) const {
    const C inner = own - dot;
    if (lift_ == C(0)) return inner == C(0) ? C(0) : p * inner;
    // Where the teacher counts nothing its p may be as much above the mixture as numbers go: dot takes it plain.
    return (own == C(0) ? own : lifted(t, x) * own) - (dot == C(0) ? dot : p * dot);
  }

  __device__ __forceinline__ void write_gradients() const {
    const C factor = static_cast<C>(factors_[0]), other = static_cast<C>(factors_[1]);
    this->template each_part<true>([&](const Part& part) {
      double sum[N];
      C m[N], center[N];
      find_sums(part, sum), mix(part, sum, m), find_centers(part, m, center);
#pragma unroll 1
      for (int k = 0; k < K_; ++k) {
        const Teacher t = teacher(k);
        const bool skip = skipped(k);
        const C outer = by_class() ? C(1) : number(kShare, k), dot = probs_ && a_.as_is ? C(0) : static_cast<C>(exactly(kDot, k));
        C x[N], w[N];
        load_teacher(k, part, x), weigh(k, part, sum, w);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C p = skip ? C(0) : power(t, x[i]);
          if (a_.weights_grad.present && by_class() && part.holds(i)) {
            const double difference = static_cast<double>(lift_ == C(0) ? p : lifted(t, x[i])) - static_cast<double>(m[i]);
            const double toward = factors_[0] * temperature_ * static_cast<double>(center[i]) * difference;
            const std::int64_t c = this->class_of(part, i);
            this->to_weight(k, c, sum[i] == 0 || this->weight(k, c) == 0 ? 0.0 : toward / sum[i]);
          }
          C value;
          if (probs_) {
            value = toward_teacher(t, x[i], p, w[i] == C(0) ? C(0) : w[i] * center[i], dot) * factor;
          } else if (js_) {  // -p (log mixture - log p + KL)
            value = -p * (center[i] - log_power(t, x[i]) + dot) * factor;
          } else {  // p (g (-log mixture - cross entropy) + h (-log p - entropy))
            value = p * (center[i] - other * log_power(t, x[i]) - dot);
          }
          const bool gone = p == C(0) && lift_ == C(0);  // lifted, what counts may underflow and yet be the mixture
          x[i] = gone || outer == C(0) ? C(0) : outer * value;
        }
        if (a_.teachers_grad.present) this->to_teacher(k, part, x);
      }
    });
  }
  __device__ __forceinline__ static bool too_near(double loss) { return sizeof(C) == 4 && loss < kNear; }

  const bool probs_, js_;
  double kl_ = 0;
  C lift_ = 0;  // not 0 where the mixture's probabilities would underflow or overflow: the logarithm they are over
  C normaliser_ = 1, log_normaliser_ = 0;  // of the mixture: one over its sum, the sum's logarithm
};

}  // namespace fedkern::cuda
