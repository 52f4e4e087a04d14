// The losses of distill.h for a group of threads on one row. Each goes through a row up to three times: `look` finds what the
// rest needs of the whole row, `sum` the loss, `gradients` what it is called. In between, the group puts together what its
// threads found; where blocks share a row, so do they, by way of `save` and `load`. What the gradients need may be kept for
// another call.
#pragma once

#include "distill_math.cuh"
#include "distill_rows.cuh"

namespace fedkern::cuda {

inline constexpr int kFound = 6;  // numbers that `look` finds of a row
inline constexpr int kSums = 4;   // and `sum`

// f(d, index) for the dimensions of the rows.
template <typename F>
__device__ __forceinline__ void each_index(const DistillCall& a, std::int64_t row, F&& f) {
  // One loop for all tensors: a division costs more than the rest.
#pragma unroll 1
  for (int d = a.row_dims - 1; d >= 0; --d) {
    const std::int64_t rest = d ? quotient(row, a.row_size[d]) : 0;
    f(d, row - rest * a.row_size[d]);
    row = rest;
  }
}

// Where a row's inputs lie, and its factors.
struct RowPlace {
  std::int64_t input[1 + kMaxStudents] = {};  // the teacher first
  double weight = 1, outer = 1;               // outer: the factor of the gradients

  __device__ __forceinline__ RowPlace(const DistillCall& a, std::int64_t row) {
    each_index(a, row, [&](int d, std::int64_t i) {
      input[0] += i * a.teacher.row_stride[d];
#pragma unroll
      for (int k = 0; k < kMaxStudents; ++k) input[1 + k] += i * a.student[k].row_stride[d];
      weight_at_ += i * a.weight.row_stride[d];
      outer_at_ += i * a.grad_output.row_stride[d];
    });
  }
  // Apart, so that the loads of the row's logits can be under way before these are waited for.
  __device__ __forceinline__ void read_factors(const DistillCall& a) {
    if (a.weight.present) weight = load_value<double>(a.weight.data, a.weight.dtype, weight_at_);
    if (a.grad_output.present) outer = load_value<double>(a.grad_output.data, a.grad_output.dtype, outer_at_);
  }

 private:
  std::int64_t weight_at_ = 0, outer_at_ = 0;
};

// Where a row's gradients go: found when they are there, which saves the registers until then.
struct GradientPlace {
  std::int64_t gradient[1 + kMaxStudents] = {};  // the teacher first

  __device__ __forceinline__ GradientPlace(const DistillCall& a, std::int64_t row) {
    each_index(a, row, [&](int d, std::int64_t i) {
      gradient[0] += i * a.teacher_grad.row_stride[d];
#pragma unroll
      for (int k = 0; k < kMaxStudents; ++k) gradient[1 + k] += i * a.student_grad[k].row_stride[d];
    });
  }
};

__host__ __device__ inline bool wants_gradients(const DistillCall& a) {
  return a.teacher_grad.present || a.student_grad[0].present || a.student_grad[1].present;
}
__host__ __device__ inline bool wants_loss(const DistillCall& a) { return a.row_loss.present || a.raw_loss.present || a.total.present; }

// The sum of a thread's N numbers, eight in a row at most before fp64.
template <typename C, int N>
class Sum {
 public:
  __device__ __forceinline__ void add(int i, C value) { part_[i % kParts] += value; }
  __device__ __forceinline__ double total() const {
    double sum = static_cast<double>(part_[0]);
#pragma unroll
    for (int i = 1; i < kParts; ++i) sum += static_cast<double>(part_[i]);
    return sum;
  }

 private:
  static constexpr int kParts = (N + 7) / 8;
  C part_[kParts] = {};
};

// Softmax rows of `Inputs` tensors, the teacher's first. Hold: the classes of a thread where it holds its part of the row in
// registers; 0: it reads the row anew each time, some classes at a time, and fp64, which is rare, has the smaller code.
template <typename C, typename G, typename T, int Hold, int Inputs>
class SoftmaxRows {
 public:
  static constexpr int inputs = Inputs;

 protected:
  static constexpr int N = Hold ? Hold : sizeof(C) == 8 ? 1 : G::lanes == kBlock && Inputs < 3 ? 8 : 4;
  using Part = Classes<N, G::lanes, kWidth<T>>;

  __device__ SoftmaxRows(const DistillCall& a, const RowPlace& at, C inverse) : a_(a), at_(at), inverse_(inverse) {}

 public:
  __device__ __forceinline__ void hold(std::int64_t classes) {
    if constexpr (Hold > 0) load(part(0, classes), held_);
  }

  __device__ __forceinline__ void look(std::int64_t begin, std::int64_t end) {
    if constexpr (Hold > 0) {
#pragma unroll
      for (int k = 0; k < Inputs; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) soft_[k].maximum = fmax(soft_[k].maximum, held_[k][i]);
      }
    } else {
      each(begin, end, [&](const Part&, C (&x)[Inputs][N]) {
#pragma unroll
        for (int k = 0; k < Inputs; ++k) soft_[k].template add<N>(x[k], inverse_);
      });
    }
  }
  __device__ __forceinline__ void gather_found() {
    double sum[Inputs];
#pragma unroll
    for (int k = 0; k < Inputs; ++k) maximum_[k] = soft_[k].maximum;
    G::maximum_all(maximum_);
    if constexpr (Hold > 0) {
#pragma unroll
      for (int k = 0; k < Inputs; ++k) {
        const C from = Softmax<C>::reference(maximum_[k]);
        Sum<C, N> part;
#pragma unroll
        for (int i = 0; i < N; ++i) part.add(i, exponential(held_[k][i] - from, inverse_));
        sum[k] = part.total();
      }
    } else {
#pragma unroll
      for (int k = 0; k < Inputs; ++k) {
        const C lower = soft_[k].maximum, factor = lower == -infinity<C>() ? C(0) : exponential(lower - maximum_[k], inverse_);
        sum[k] = soft_[k].sum * static_cast<double>(factor);
      }
    }
    G::sum_all(sum);
#pragma unroll
    for (int k = 0; k < Inputs; ++k) soft_[k].maximum = maximum_[k], soft_[k].sum = sum[k], normaliser_[k] = C(1) / static_cast<C>(sum[k]);
  }
  __device__ __forceinline__ void save_found(double* to) const {
#pragma unroll
    for (int k = 0; k < Inputs; ++k) to[2 * k] = static_cast<double>(soft_[k].maximum), to[2 * k + 1] = soft_[k].sum;
  }
  __device__ __forceinline__ void load_found(const double* from) {
#pragma unroll
    for (int k = 0; k < Inputs; ++k) soft_[k].maximum = static_cast<C>(from[2 * k]), soft_[k].sum = from[2 * k + 1];
  }

 protected:
  // The thread's classes of those from `begin` on.
  __device__ __forceinline__ static Part part(std::int64_t begin, std::int64_t end) { return {begin + kWidth<T> * G::lane(), end}; }
  __device__ __forceinline__ const Logits& input(int k) const { return k == 0 ? a_.teacher : a_.student[k == 0 ? 0 : k - 1]; }
  __device__ __forceinline__ void load(const Part& at, C (&x)[Inputs][N]) const {
#pragma unroll
    for (int k = 0; k < Inputs; ++k) load_classes<T>(input(k), at_.input[k], at, x[k]);
  }
  // f(part, logits) for the thread's classes, where f may put something else in the logits' place.
  template <bool Back = false, typename F>
  __device__ __forceinline__ void each(std::int64_t begin, std::int64_t end, F&& f) const {
    if constexpr (Hold > 0) {
      C x[Inputs][N];
#pragma unroll
      for (int k = 0; k < Inputs; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[k][i] = held_[k][i];
      }
      f(part(begin, end), x);
    } else if constexpr (kKnown<T>) {
      struct Values {
        Loaded<T, C, N> row[Inputs];
      };
      each_loaded<G, N, Back, kWidth<T>, Values>(
          begin, end,
          [&](const Part& at, Values& to) {
#pragma unroll
            for (int k = 0; k < Inputs; ++k) load_raw<T, C>(input(k), at_.input[k], at, to.row[k]);
          },
          [&](const Part& at, const Values& from) {
            C x[Inputs][N];
#pragma unroll
            for (int k = 0; k < Inputs; ++k) widen_raw<T>(input(k), from.row[k], x[k]);
            f(at, x);
          });
    } else {
      each_classes<G, N, Back, kWidth<T>>(begin, end, [&](const Part& at) {
        C x[Inputs][N];
        load(at, x);
        f(at, x);
      });
    }
  }

  const DistillCall& a_;
  const RowPlace& at_;
  const C inverse_;
  Softmax<C> soft_[Inputs];                     // of the thread's classes, then of the row
  C maximum_[Inputs], normaliser_[Inputs];      // of the row; 1 / sum
  C held_[Inputs][Hold ? Hold : 1];
};

// The temperature's square in the loss, its first power in the gradients.
template <typename C, typename G, typename T, int Hold, int Students>
class Divergence : public SoftmaxRows<C, G, T, Hold, 1 + Students> {
  using Base = SoftmaxRows<C, G, T, Hold, 1 + Students>;
  using typename Base::Part;
  using Base::a_, Base::inverse_, Base::maximum_, Base::N, Base::normaliser_, Base::soft_;

 public:
  static constexpr int sums = 2 * Students;

  __device__ Divergence(const DistillCall& a, const RowPlace& at)
      : Base(a, at, C(1) / static_cast<C>(a.temperature)), temperature_(a.temperature) {}

  // After gather_found.
  __device__ __forceinline__ void settle_found() {
#pragma unroll
    for (int k = 0; k < Students; ++k) {
      const C student = static_cast<C>(soft_[1 + k].sum), teacher = static_cast<C>(soft_[0].sum);
      log_ratio_[k] = logarithm(reverse() ? teacher / student : student / teacher);
    }
  }
  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end) {
    this->template each<true>(begin, end, [&](const Part&, C (&x)[1 + Students][N]) {
#pragma unroll
      for (int k = 0; k < Students; ++k) {
        Sum<C, N> value, drift;
        each_term(k, x[0], x[1 + k], [&](int i, const Term<C>& term) { value.add(i, term.value), drift.add(i, term.difference); });
        summed[2 * k] += value.total(), summed[2 * k + 1] += drift.total();
      }
    });
  }
  // After the sums were put together.
  __device__ __forceinline__ void settle_sums() {
#pragma unroll
    for (int k = 0; k < Students; ++k) kl_[k] = static_cast<C>(settled(summed[2 * k], summed[2 * k + 1]));
  }
  __device__ __forceinline__ double loss() const {
    double total = 0;
#pragma unroll
    for (int k = 0; k < Students; ++k) total += settled(summed[2 * k], summed[2 * k + 1]);
    return total * temperature_ * temperature_;
  }

  __device__ __forceinline__ void keep(C* to) const {
#pragma unroll
    for (int k = 0; k <= Students; ++k) to[2 * k] = maximum_[k], to[2 * k + 1] = normaliser_[k];
#pragma unroll
    for (int k = 0; k < Students; ++k) to[2 + 2 * Students + 2 * k] = log_ratio_[k], to[3 + 2 * Students + 2 * k] = kl_[k];
  }
  __device__ __forceinline__ void recall(const C* from) {
#pragma unroll
    for (int k = 0; k <= Students; ++k) maximum_[k] = from[2 * k], normaliser_[k] = from[2 * k + 1];
#pragma unroll
    for (int k = 0; k < Students; ++k) log_ratio_[k] = from[2 + 2 * Students + 2 * k], kl_[k] = from[3 + 2 * Students + 2 * k];
  }

  // Whether the gradients need the sums: those toward P do.
  __host__ __device__ static bool wants_sums(const DistillCall& a) {
    return a.reverse ? a.student_grad[0].present || a.student_grad[1].present : a.teacher_grad.present;
  }
  __device__ __forceinline__ void gradients(const GradientPlace& to, std::int64_t begin, std::int64_t end, C factor) const {
    factor *= static_cast<C>(temperature_);
    // Those of one tensor after another: together they would take more registers than there are.
    this->each(begin, end, [&](const Part& at, C (&x)[1 + Students][N]) {
      C y[N];
#pragma unroll
      for (int k = 0; k < Students; ++k) {
        if (!a_.student_grad[k].present) continue;
        each_term(k, x[0], x[1 + k], [&](int i, const Term<C>& term) { y[i] = (reverse() ? term.toward_p(kl_[k]) : term.difference) * factor; });
        store_classes<T>(a_.student_grad[k], to.gradient[1 + k], at, y);
      }
      if (!a_.teacher_grad.present) return;
#pragma unroll
      for (C& toward : y) toward = 0;
#pragma unroll
      for (int k = 0; k < Students; ++k)
        each_term(k, x[0], x[1 + k], [&](int i, const Term<C>& term) { y[i] += reverse() ? term.difference : term.toward_p(kl_[k]); });
#pragma unroll
      for (C& toward : y) toward *= factor;
      store_classes<T>(a_.teacher_grad, to.gradient[0], at, y);
    });
  }

  double summed[sums] = {};

 private:
  // Of one student the caller has exchanged the two.
  __device__ __forceinline__ bool reverse() const { return Students > 1 && a_.reverse; }

  // f(class, term). One choice for all classes: the compiler then mixes their arithmetic.
  template <typename F>
  __device__ __forceinline__ void each_term(int k, const C (&teacher)[N], const C (&student)[N], F&& f) const {
    const int other = 1 + k;
    if (reverse()) {
      const Pair<C> pair(maximum_[other], maximum_[0], normaliser_[other], normaliser_[0], log_ratio_[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, Term<C>(pair, student[i], teacher[i], inverse_));
    } else {
      const Pair<C> pair(maximum_[0], maximum_[other], normaliser_[0], normaliser_[other], log_ratio_[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, Term<C>(pair, teacher[i], student[i], inverse_));
    }
  }

  const double temperature_;
  C log_ratio_[Students], kl_[Students];
};
template <typename C, typename G, typename T, int Hold>
using OneDivergence = Divergence<C, G, T, Hold, 1>;
template <typename C, typename G, typename T, int Hold>
using TwoDivergences = Divergence<C, G, T, Hold, 2>;

// T = infinity: half the variance of d = teacher - student over the classes unmasked in both.
template <typename C, typename G, typename T, int>
class Limit {
 public:
  static constexpr int inputs = 1 + kMaxStudents, sums = kMaxStudents;

  __device__ Limit(const DistillCall& a, const RowPlace& at) : a_(a), at_(at) {}

  __device__ __forceinline__ void hold(std::int64_t) {}
  __device__ __forceinline__ void look(std::int64_t begin, std::int64_t end) {
    each_difference(begin, end, [&](int k, double d, std::int64_t) { found_[2 * k] += 1, found_[2 * k + 1] += d; });
  }
  __device__ __forceinline__ void gather_found() { G::sum_all(found_); }
  __device__ __forceinline__ void settle_found() {}
  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end) {
    each_difference(begin, end, [&](int k, double d, std::int64_t) {
      const double rest = d - mean(k);
      summed[k] += rest * rest;
    });
  }
  __device__ __forceinline__ void settle_sums() {}
  __device__ __forceinline__ double loss() const {
    return 0.5 * (summed[0] / found_[0] + (a_.students > 1 ? summed[1] / found_[2] : 0.0));
  }
  // Nothing is kept.
  __device__ __forceinline__ void keep(C*) const {}
  __device__ __forceinline__ void recall(const C*) {}

  __host__ __device__ static bool wants_sums(const DistillCall&) { return false; }
  __device__ __forceinline__ void gradients(const GradientPlace& to, std::int64_t begin, std::int64_t end, C factor) const {
    for (std::int64_t c = begin + G::lane(); c < end; c += G::lanes) {
      const Classes<1, 1> part(c, end);
      C together[1] = {0};
#pragma unroll
      for (int k = 0; k < kMaxStudents; ++k) {
        if (k >= a_.students) break;
        double d;
        C value[1] = {difference(k, c, d) ? static_cast<C>((d - mean(k)) / found_[2 * k] * static_cast<double>(factor)) : C(0)};
        together[0] += value[0];
        value[0] = -value[0];
        if (a_.student_grad[k].present) store_classes<T>(a_.student_grad[k], to.gradient[1 + k], part, value);
      }
      if (a_.teacher_grad.present) store_classes<T>(a_.teacher_grad, to.gradient[0], part, together);
    }
  }

  double summed[sums] = {};

 private:
  __device__ __forceinline__ double mean(int k) const { return found_[2 * k + 1] / found_[2 * k]; }

  __device__ __forceinline__ bool difference(int k, std::int64_t c, double& d) const {
    C t[1], s[1];
    load_classes<T>(a_.teacher, at_.input[0], Classes<1, 1>(c, a_.classes), t);
    load_classes<T>(a_.student[k], at_.input[1 + k], Classes<1, 1>(c, a_.classes), s);
    d = static_cast<double>(t[0] - s[0]);
    return t[0] != -infinity<C>() && s[0] != -infinity<C>();
  }
  template <typename F>
  __device__ __forceinline__ void each_difference(std::int64_t begin, std::int64_t end, F f) const {
    for (std::int64_t c = begin + G::lane(); c < end; c += G::lanes) {
#pragma unroll
      for (int k = 0; k < kMaxStudents; ++k) {
        double d;
        if (k < a_.students && difference(k, c, d)) f(k, d, c);
      }
    }
  }

  const DistillCall& a_;
  const RowPlace& at_;
  double found_[2 * kMaxStudents] = {};  // number and sum of the differences
};

// H = log Z + sum P (max - x), both terms >= 0; dH/dx = P ((max - x) - sum P (max - x)).
template <typename C, typename G, typename T, int Hold>
class Entropy : public SoftmaxRows<C, G, T, Hold, 1> {
  using Base = SoftmaxRows<C, G, T, Hold, 1>;
  using typename Base::Part;
  using Base::a_, Base::maximum_, Base::N, Base::normaliser_, Base::soft_;

 public:
  static constexpr int sums = 1;

  __device__ Entropy(const DistillCall& a, const RowPlace& at) : Base(a, at, C(1)) {}

  __device__ __forceinline__ void settle_found() {}
  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end) {
    this->template each<true>(begin, end, [&](const Part&, C (&x)[1][N]) {
      Sum<C, N> value;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        C e;
        value.add(i, below(x[0][i], 1, e));
      }
      summed[0] += value.total();
    });
    summed[0] *= static_cast<double>(normaliser_[0]);
  }
  __device__ __forceinline__ void settle_sums() { depth_ = static_cast<C>(summed[0]); }
  __device__ __forceinline__ double loss() const { return static_cast<double>(logarithm(static_cast<C>(soft_[0].sum))) + summed[0]; }

  __device__ __forceinline__ void keep(C* to) const { to[0] = maximum_[0], to[1] = normaliser_[0], to[2] = depth_; }
  __device__ __forceinline__ void recall(const C* from) { maximum_[0] = from[0], normaliser_[0] = from[1], depth_ = from[2]; }

  __host__ __device__ static bool wants_sums(const DistillCall& a) { return a.teacher_grad.present; }
  __device__ __forceinline__ void gradients(const GradientPlace& to, std::int64_t begin, std::int64_t end, C factor) const {
    this->each(begin, end, [&](const Part& at, C (&x)[1][N]) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        C p;
        const C value = below(x[0][i], normaliser_[0], p);
        x[0][i] = (value - p * depth_) * factor;
      }
      store_classes<T>(a_.teacher_grad, to.gradient[0], at, x[0]);
    });
  }

  double summed[sums] = {};

 private:
  // P (max - x), and 0 where P is 0; P = e^(x - max) factor.
  __device__ __forceinline__ C below(C x, C factor, C& p) const {
    const C depth = maximum_[0] - x;
    p = exponential(-depth) * factor;
    return p > C(0) ? p * depth : p;
  }

  C depth_;
};

}  // namespace fedkern::cuda
