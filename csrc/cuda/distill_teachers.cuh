// What all losses of K teachers need of a row: where it lies, what is kept per teacher, their shares, the student's softmax.
// What is known per teacher waits in global memory (a slot, in the caches), so that K is not limited.
#pragma once

#include "distill_mixture.cuh"
#include "distill_rows.cuh"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern::cuda {

// Where a row lies, and what belongs to it.
struct EnsemblePlace {
  std::int64_t student = 0, teachers = 0, weights = 0, student_grad = 0, teachers_grad = 0, weights_grad = 0, kept = 0;
  std::int64_t row_loss[2] = {};
  double outer[2] = {1, 1};  // factors of the gradients

  // `outers`: whether those factors are read now.
  __device__ __forceinline__ EnsemblePlace(const EnsembleCall& a, std::int64_t row, bool outers = true) {
#pragma unroll 1
    for (int d = a.row_dims - 1; d >= 0; --d) {
      const std::int64_t rest = d ? quotient(row, a.row_size[d]) : 0, i = row - rest * a.row_size[d];
      row = rest;
      student += i * a.student.row_stride[d];
      teachers += i * a.teachers.row_stride[d];
      weights += i * a.weights.row_stride[d];
      student_grad += i * a.student_grad.row_stride[d];
      teachers_grad += i * a.teachers_grad.row_stride[d];
      weights_grad += i * a.weights_grad.row_stride[d];
      kept += i * a.kept.row_stride[d];
#pragma unroll
      for (int r = 0; r < 2; ++r) row_loss[r] += i * a.row_loss[r].row_stride[d], outer_at_[r] += i * a.grad_output[r].row_stride[d];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (outers) outer[r] = factor(a, r);
  }
  __device__ __forceinline__ double factor(const EnsembleCall& a, int r) const {
    return a.grad_output[r].present ? load_value<double>(a.grad_output[r].data, a.grad_output[r].dtype, outer_at_[r]) : 1.0;
  }

 private:
  std::int64_t outer_at_[2] = {};
};

// A row for a group of threads, computed in C. T: the type of all logits and gradients, whose classes lie together and whose
// weights are those of rows; void: any, known at run time.
template <typename C, int Lanes, typename T>
class TeacherRow {
 protected:
  using G = Group<Lanes>;
  static constexpr int N = sizeof(C) == 4 ? 4 : 1;          // classes of a thread at a time
  static constexpr int kTogether = kKnown<T> ? 4 : 1;  // teachers that are loaded at a time
  using Part = Classes<N, Lanes>;
  // Sums over classes are taken by warps, and kept by each of a block's.
  static constexpr int kParts = Lanes == kBlock ? kWarps : 1;
  static_assert(kDot + kWarps <= kEnsembleNumbers);

  __device__ TeacherRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step, double temperature)
      : a_(a), at_(at), slot_(slot), step_(step), K_(static_cast<int>(a.count)), temperature_(temperature),
        inverse_t_(static_cast<C>(1 / temperature)) {}

  // Of gradients toward logits; those toward weights have the temperature once more.
  __device__ __forceinline__ void find_factors() {
    factors_[0] = at_.outer[0] * a_.scale * temperature_, factors_[1] = at_.outer[1] * a_.scale;
  }
  __device__ __forceinline__ bool wants_late() const { return a_.teachers_grad.present || a_.weights_grad.present; }
  __device__ __forceinline__ bool by_class() const { return !kKnown<T> && a_.by_class; }

  // --- what is kept per teacher

  __device__ __forceinline__ double* place(int name, int k) const {
    return slot_ + (static_cast<std::int64_t>(k) * kEnsembleNumbers + name) * (Lanes == 1 ? step_ : 1);
  }
  // kShare to kLogSum are kept as they are computed, the rest in fp64.
  __device__ __forceinline__ C number(int name, int k) const { return *reinterpret_cast<const C*>(place(name, k)); }
  __device__ __forceinline__ double exactly(int name, int k) const { return *place(name, k); }
  __device__ __forceinline__ void keep(int name, int k, C value) const {
    if (G::lane() == 0) *reinterpret_cast<C*>(place(name, k)) = value;
  }
  __device__ __forceinline__ void keep_exactly(int name, int k, double value) const {
    if (G::lane() == 0) *place(name, k) = value;
  }
  // What one thread keeps, the others read.
  __device__ __forceinline__ static void together() {
    if constexpr (Lanes == 32) __syncwarp();
    if constexpr (Lanes == kBlock) __syncthreads();
  }

  // Sums over classes, per teacher: cleared, added to by parts of the group's classes, put together.
  __device__ __forceinline__ void clear_dots() {
    together();
    for (int k = G::lane(); k < K_; k += Lanes)
      for (int part = 0; part < kParts; ++part) *place(kDot + part, k) = 0;
    together();
  }
  __device__ __forceinline__ void add_dot(int k, C value) {
    double sum = static_cast<double>(value);
    if constexpr (Lanes > 1) sum = Group<32>::sum(sum);
    const int part = Lanes == kBlock ? static_cast<int>(threadIdx.x) / 32 : 0;
    if (Lanes == 1 || threadIdx.x % 32 == 0) *place(kDot + part, k) += sum;
  }
  __device__ __forceinline__ void gather_dots() {
    together();
    if constexpr (kParts > 1) {
      for (int k = G::lane(); k < K_; k += Lanes) {
        double sum = 0;
        for (int part = 0; part < kParts; ++part) sum += exactly(kDot + part, k);
        *place(kDot, k) = sum;
      }
      together();
    }
  }

  // f(part) for parts of the group's classes: all of its threads come along.
  template <bool Back = false, typename F>
  __device__ __forceinline__ void each_part(F&& f) const {
    each_classes<G, N, Back>(0, a_.classes, f);
  }

  // --- inputs and outputs

  __device__ __forceinline__ void load_teacher(int k, const Part& part, C (&x)[N]) const {
    load_classes<T>(a_.teachers, at_.teachers + k * a_.teachers.stack_stride, part, x);
  }
  __device__ __forceinline__ void load_student(const Part& part, C (&x)[N]) const { load_classes<T>(a_.student, at_.student, part, x); }
  __device__ __forceinline__ void to_student(const Part& part, const C (&value)[N]) const {
    store_classes<T>(a_.student_grad, at_.student_grad, part, value);
  }
  __device__ __forceinline__ void to_teacher(int k, const Part& part, const C (&value)[N]) const {
    store_classes<T>(a_.teachers_grad, at_.teachers_grad + k * a_.teachers_grad.stack_stride, part, value);
  }
  __device__ __forceinline__ void to_weight(int k, std::int64_t c, double value) const {
    const Stack& to = a_.weights_grad;
    store_weight_gradient(to, at_.weights_grad + k * to.stack_stride + c * to.class_stride, value);
  }

  // --- shares

  __device__ __forceinline__ double weight(int k, std::int64_t c) const { return weight_of(a_, at_.weights, k, c); }
  __device__ __forceinline__ static std::int64_t class_of(const Part& part, int i) { return part.first + (part.holds(i) ? i * Lanes : 0); }
  // The sums of the weights of a part's classes, looked at where they differ between classes.
  __device__ __forceinline__ void find_sums(const Part& part, double (&sum)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = by_class() && part.left > 0 ? weight_sum(a_, at_.weights, class_of(part, i)) : 0.0;
  }
  // A teacher's shares of a part's classes.
  __device__ __forceinline__ void find_shares(int k, const Part& part, const double (&sum)[N], C (&share)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      share[i] = !by_class() ? number(kShare, k)
                 : part.left > 0 ? static_cast<C>(share_of(a_, at_.weights, k, class_of(part, i), sum[i]))
                                 : C(0);
  }
  __device__ void find_shares() {
    together();  // the last row's numbers are no longer read
    if (by_class()) return;
    total_ = weight_sum(a_, at_.weights, 0);
    for (int k = 0; k < K_; ++k) {
      const double share = total_ == 0 ? 1.0 / K_ : weight(k, 0) / total_;
      keep_exactly(kWeight, k, share), keep(kShare, k, static_cast<C>(share));
    }
    together();
  }
  // The softmax of a teacher without a share is not known, nor needed.
  __device__ __forceinline__ bool skipped(int k) const { return !by_class() && number(kShare, k) == C(0); }

  // --- softmaxes

  __device__ __forceinline__ void find_student() {
    add_softmaxes<1>([&](int, const auto& part, auto& x) { load_classes<T>(a_.student, at_.student, part, x); },
                     [&](int, const Softmax<C>& soft) {
                       student_ = soft;
                       student_inverse_ = static_cast<C>(1 / soft.sum);
                       student_log_sum_ = logarithm(static_cast<C>(soft.sum));
                     });
  }
  // f(k, softmax) for all teachers.
  template <typename F>
  __device__ __forceinline__ void each_softmax(F&& f) const {
    each_few([&](auto few, int first) {
      add_softmaxes<decltype(few)::value>(
          [&](int j, const auto& part, auto& x) {
            load_classes<T>(a_.teachers, at_.teachers + (first + j) * a_.teachers.stack_stride, part, x);
          },
          [&](int j, const Softmax<C>& soft) { f(first + j, soft); });
    });
    together();
  }
  // f(j, softmax) of J rows, whose parts load(j, part, x) finds; about as many loads are under way for one as for many.
  template <int J, typename Load, typename F>
  __device__ __forceinline__ void add_softmaxes(Load&& load, F&& f) const {
    constexpr int M = kKnown<T> && Lanes == kBlock ? N * (4 / J) : N;
    Softmax<C> soft[J];
    each_classes<G, M>(0, a_.classes, [&](const auto& part) {
      C x[J][M];
#pragma unroll
      for (int j = 0; j < J; ++j) load(j, part, x[j]);
#pragma unroll
      for (int j = 0; j < J; ++j) soft[j].template add<M>(x[j], inverse_t_);
    });
#pragma unroll
    for (int j = 0; j < J; ++j) {
      soft[j].template gather<G>(inverse_t_);
      f(j, soft[j]);
    }
  }
  // f(number, first) for teachers, kTogether at a time; `number` is an integral_constant.
  template <typename F>
  __device__ __forceinline__ void each_few(F&& f) const {
    int first = 0;
#pragma unroll 1
    for (; first + kTogether <= K_; first += kTogether) f(std::integral_constant<int, kTogether>{}, first);
    if constexpr (kTogether > 1) {
      if (K_ - first >= 2) f(std::integral_constant<int, 2>{}, first), first += 2;
      if (K_ - first) f(std::integral_constant<int, 1>{}, first);
    }
  }

  // With kDot the derivative toward each share: those of the weights, w_k / sum w.
  __device__ void weight_gradients(double factor) {
    if (!a_.weights_grad.present || by_class()) return;
    double mean = 0;
    for (int k = 0; k < K_; ++k) mean += exactly(kWeight, k) == 0 ? 0.0 : exactly(kWeight, k) * exactly(kDot, k);
    for (int k = G::lane(); k < K_; k += Lanes)
      to_weight(k, 0, total_ == 0 || exactly(kWeight, k) == 0 ? 0.0 : factor * (exactly(kDot, k) - mean) / total_);
  }

  const EnsembleCall& a_;
  const EnsemblePlace& at_;
  double* const slot_;
  const std::int64_t step_;
  const int K_;
  const double temperature_;
  const C inverse_t_;
  double factors_[2] = {}, total_ = 0;
  Softmax<C> student_;
  C student_inverse_ = 0, student_log_sum_ = 0;
};

}  // namespace fedkern::cuda
