// The losses of distill.h for a group of threads on one row. Each goes through a row three times: `look` takes what the
// rest needs of the whole row, `sum` the loss and the gradients that do not need it, `late` those that do. In between, the
// group puts together what its threads found; where blocks share a row, so do they, by way of `save` and `load`.
#pragma once

#include "distill_math.cuh"
#include "distill_rows.cuh"

namespace fedkern::cuda {

inline constexpr int kFound = 6;  // numbers that `look` finds of a row
inline constexpr int kSums = 4;   // and `sum`
// Classes of a thread at a time; fp64 is rare, and has the smaller code.
template <typename C, typename G>
inline constexpr int kClasses = sizeof(C) == 8 ? 1 : G::lanes == kBlock ? 8 : 4;

// Where a row lies, and what belongs to it.
struct RowPlace {
  std::int64_t input[1 + kMaxStudents] = {}, gradient[1 + kMaxStudents] = {};  // the teacher first
  std::int64_t row_loss = 0, raw_loss = 0;
  double weight = 1, outer = 1;  // outer: the factor of the gradients

  __device__ __forceinline__ RowPlace(const DistillCall& a, std::int64_t row) {
    std::int64_t weight_at = 0, outer_at = 0;
    // One loop for all tensors: a division costs more than the rest.
#pragma unroll 1
    for (int d = a.row_dims - 1; d >= 0; --d) {
      const std::int64_t rest = d ? row / a.row_size[d] : 0, i = row - rest * a.row_size[d];
      row = rest;
      input[0] += i * a.teacher.row_stride[d];
      gradient[0] += i * a.teacher_grad.row_stride[d];
#pragma unroll
      for (int k = 0; k < kMaxStudents; ++k) {
        input[1 + k] += i * a.student[k].row_stride[d];
        gradient[1 + k] += i * a.student_grad[k].row_stride[d];
      }
      row_loss += i * a.row_loss.row_stride[d];
      raw_loss += i * a.raw_loss.row_stride[d];
      weight_at += i * a.weight.row_stride[d];
      outer_at += i * a.grad_output.row_stride[d];
    }
    if (a.weight.present) weight = load_value<double>(a.weight.data, a.weight.dtype, weight_at);
    if (a.grad_output.present) outer = load_value<double>(a.grad_output.data, a.grad_output.dtype, outer_at);
  }
};

// The temperature's square in the loss, its first power in the gradients.
template <typename C, typename G, typename T>
class Divergence {
  static constexpr int N = kClasses<C, G>;

 public:
  __device__ Divergence(const DistillCall& a, const RowPlace& at)
      : a_(a), at_(at), inverse_(C(1) / static_cast<C>(a.temperature)), temperature_(a.temperature) {}

  __device__ __forceinline__ void look(std::int64_t begin, std::int64_t end) {
    each_classes<G, N>(begin, end, [&](const auto& at) {
      C t[N], s[N], o[N];
      load_inputs(at, t, s, o);
      soft_[0].template add<N>(t, inverse_);
      soft_[1].template add<N>(s, inverse_);
      if (two()) soft_[2].template add<N>(o, inverse_);
    });
  }
  __device__ __forceinline__ void gather_found() {
#pragma unroll
    for (int k = 0; k <= kMaxStudents; ++k)
      if (k < 2 || two()) soft_[k].template gather<G>(inverse_);
  }
  __device__ __forceinline__ void save_found(double* to) const {
#pragma unroll
    for (int k = 0; k <= kMaxStudents; ++k) to[2 * k] = static_cast<double>(soft_[k].maximum), to[2 * k + 1] = soft_[k].sum;
  }
  __device__ __forceinline__ void load_found(const double* from) {
#pragma unroll
    for (int k = 0; k <= kMaxStudents; ++k) soft_[k].maximum = static_cast<C>(from[2 * k]), soft_[k].sum = from[2 * k + 1];
  }

  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end, C factor) {
    factor *= static_cast<C>(temperature_);
    const Pair<C> first = pair(soft_[1]), second = two() ? pair(soft_[2]) : first;
    each_classes<G, N, true>(begin, end, [&](const auto& at) {
      C t[N], s[N], o[N], value = 0, drift = 0, other_value = 0, other_drift = 0;
      load_inputs(at, t, s, o);
      each_term(first, t, s, [&](C& gradient, const Term<C>& term) {
        value += term.value, drift += term.difference;
        gradient = term.difference * factor;
      });
      if (two())
        each_term(second, t, o, [&](C& gradient, const Term<C>& term) {
          other_value += term.value, other_drift += term.difference;
          gradient = term.difference * factor;
        });
#pragma unroll
      for (int i = 0; i < N; ++i) t[i] = two() ? s[i] + o[i] : s[i];
      sums[0] += static_cast<double>(value), sums[1] += static_cast<double>(drift);
      sums[2] += static_cast<double>(other_value), sums[3] += static_cast<double>(other_drift);
      if (a_.reverse) {
        if (a_.teacher_grad.present) store_classes<T>(a_.teacher_grad, at_.gradient[0], at, t);
      } else {
        if (a_.student_grad[0].present) store_classes<T>(a_.student_grad[0], at_.gradient[1], at, s);
        if (a_.student_grad[1].present) store_classes<T>(a_.student_grad[1], at_.gradient[2], at, o);
      }
    });
  }
  __device__ __forceinline__ double loss() const {
    const double one = settled(sums[0], sums[1]), other = two() ? settled(sums[2], sums[3]) : 0.0;
    return (one + other) * temperature_ * temperature_;
  }

  __host__ __device__ static bool wants_late(const DistillCall& a) {
    return a.reverse ? a.student_grad[0].present || a.student_grad[1].present : a.teacher_grad.present;
  }
  __device__ __forceinline__ void late(std::int64_t begin, std::int64_t end, C factor) {
    factor *= static_cast<C>(temperature_);
    const Pair<C> first = pair(soft_[1]), second = two() ? pair(soft_[2]) : first;
    const C kl = static_cast<C>(settled(sums[0], sums[1])), other_kl = static_cast<C>(settled(sums[2], sums[3]));
    each_classes<G, N>(begin, end, [&](const auto& at) {
      C t[N], s[N], o[N];
      load_inputs(at, t, s, o);
      each_term(first, t, s, [&](C& gradient, const Term<C>& term) { gradient = term.toward_p(kl) * factor; });
      if (two()) each_term(second, t, o, [&](C& gradient, const Term<C>& term) { gradient = term.toward_p(other_kl) * factor; });
#pragma unroll
      for (int i = 0; i < N; ++i) t[i] = two() ? s[i] + o[i] : s[i];
      if (!a_.reverse) {
        if (a_.teacher_grad.present) store_classes<T>(a_.teacher_grad, at_.gradient[0], at, t);
      } else {
        if (a_.student_grad[0].present) store_classes<T>(a_.student_grad[0], at_.gradient[1], at, s);
        if (a_.student_grad[1].present) store_classes<T>(a_.student_grad[1], at_.gradient[2], at, o);
      }
    });
  }

  double sums[kSums] = {};

 private:
  __device__ __forceinline__ bool two() const { return a_.students > 1; }

  __device__ __forceinline__ void load_inputs(const Classes<N, G::lanes>& at, C (&t)[N], C (&s)[N], C (&o)[N]) const {
    load_classes<T>(a_.teacher, at_.input[0], at, t);
    load_classes<T>(a_.student[0], at_.input[1], at, s);
    if (two()) load_classes<T>(a_.student[1], at_.input[2], at, o);
  }
  __device__ __forceinline__ Pair<C> pair(const Softmax<C>& student) const {
    return a_.reverse ? Pair<C>(student, soft_[0]) : Pair<C>(soft_[0], student);
  }
  // f(student, term) for classes, where f may put something else in the student's place. One choice for all of them: the
  // compiler then mixes their arithmetic.
  template <typename F>
  __device__ __forceinline__ void each_term(const Pair<C>& pair, const C (&teacher)[N], C (&student)[N], F&& f) const {
    if (a_.reverse) {
#pragma unroll
      for (int i = 0; i < N; ++i) f(student[i], Term<C>(pair, student[i], teacher[i], inverse_));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) f(student[i], Term<C>(pair, teacher[i], student[i], inverse_));
    }
  }

  const DistillCall& a_;
  const RowPlace& at_;
  C inverse_;
  double temperature_;
  Softmax<C> soft_[1 + kMaxStudents];
};

// T = infinity: half the variance of d = teacher - student over the classes unmasked in both.
template <typename C, typename G, typename T>
class Limit {
 public:
  __device__ Limit(const DistillCall& a, const RowPlace& at) : a_(a), at_(at) {}

  __device__ __forceinline__ void look(std::int64_t begin, std::int64_t end) {
    each_difference(begin, end, [&](int k, double d, std::int64_t) { found_[2 * k] += 1, found_[2 * k + 1] += d; });
  }
  __device__ __forceinline__ void gather_found() {
#pragma unroll
    for (int i = 0; i < 2 * kMaxStudents; ++i) found_[i] = G::sum(found_[i]);
  }
  __device__ __forceinline__ void save_found(double* to) const {
#pragma unroll
    for (int i = 0; i < 2 * kMaxStudents; ++i) to[i] = found_[i];
  }
  __device__ __forceinline__ void load_found(const double* from) {
#pragma unroll
    for (int i = 0; i < 2 * kMaxStudents; ++i) found_[i] = from[i];
  }
  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end, C) {
    each_difference(begin, end, [&](int k, double d, std::int64_t) {
      const double rest = d - mean(k);
      sums[k] += rest * rest;
    });
  }
  __device__ __forceinline__ double loss() const {
    return 0.5 * (sums[0] / found_[0] + (a_.students > 1 ? sums[1] / found_[2] : 0.0));
  }
  __host__ __device__ static bool wants_late(const DistillCall& a) {
    return a.teacher_grad.present || a.student_grad[0].present || a.student_grad[1].present;
  }
  __device__ __forceinline__ void late(std::int64_t begin, std::int64_t end, C factor) {
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
        if (a_.student_grad[k].present) store_classes<T>(a_.student_grad[k], at_.gradient[1 + k], part, value);
      }
      if (a_.teacher_grad.present) store_classes<T>(a_.teacher_grad, at_.gradient[0], part, together);
    }
  }

  double sums[kSums] = {};

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
template <typename C, typename G, typename T>
class Entropy {
  static constexpr int N = kClasses<C, G>;

 public:
  __device__ Entropy(const DistillCall& a, const RowPlace& at) : a_(a), at_(at) {}

  __device__ __forceinline__ void look(std::int64_t begin, std::int64_t end) {
    each_classes<G, N>(begin, end, [&](const auto& at) {
      C x[N];
      load_classes<T>(a_.teacher, at_.input[0], at, x);
      soft_.template add<N>(x, C(1));
    });
  }
  __device__ __forceinline__ void gather_found() { soft_.template gather<G>(C(1)); }
  __device__ __forceinline__ void save_found(double* to) const { to[0] = static_cast<double>(soft_.maximum), to[1] = soft_.sum; }
  __device__ __forceinline__ void load_found(const double* from) { soft_.maximum = static_cast<C>(from[0]), soft_.sum = from[1]; }

  __device__ __forceinline__ void sum(std::int64_t begin, std::int64_t end, C) {
    const C inverse = static_cast<C>(1 / soft_.sum);
    each_classes<G, N, true>(begin, end, [&](const auto& at) {
      C x[N], value = 0;
      load_classes<T>(a_.teacher, at_.input[0], at, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        C p;
        value += below(x[i], inverse, p);
      }
      sums[0] += static_cast<double>(value);
    });
  }
  __device__ __forceinline__ double loss() const { return static_cast<double>(logarithm(static_cast<C>(soft_.sum))) + sums[0]; }

  __host__ __device__ static bool wants_late(const DistillCall& a) { return a.teacher_grad.present; }
  __device__ __forceinline__ void late(std::int64_t begin, std::int64_t end, C factor) {
    const C inverse = static_cast<C>(1 / soft_.sum), depth = static_cast<C>(sums[0]);
    each_classes<G, N>(begin, end, [&](const auto& at) {
      C x[N];
      load_classes<T>(a_.teacher, at_.input[0], at, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        C p;
        const C value = below(x[i], inverse, p);
        x[i] = (value - p * depth) * factor;
      }
      store_classes<T>(a_.teacher_grad, at_.gradient[0], at, x);
    });
  }

  double sums[kSums] = {};

 private:
  // P (max - x), and 0 where P is 0.
  __device__ __forceinline__ C below(C x, C inverse, C& p) const {
    p = exponential(x - soft_.maximum) * inverse;
    return p > C(0) ? p * (soft_.maximum - x) : p;
  }

  const DistillCall& a_;
  const RowPlace& at_;
  Softmax<C> soft_;
};

}  // namespace fedkern::cuda
