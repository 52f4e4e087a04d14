// What all losses of K teachers need of a row: where it lies, what is kept per teacher, their shares, the student's softmax.
// What is known per teacher waits in global memory (a slot, in the caches), so that K is not limited.
#pragma once

#include "distill_mixture.cuh"
#include "distill_rows.cuh"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern::cuda {

// Where a row lies, and what belongs to it.
struct EnsemblePlace {
  std::int64_t student = 0, teachers = 0, weights = 0, student_grad = 0, teachers_grad = 0, weights_grad = 0;
  std::int64_t row_loss[2] = {};
  double outer[2] = {1, 1};  // factors of the gradients

  __device__ __forceinline__ EnsemblePlace(const EnsembleCall& a, std::int64_t row) {
    std::int64_t outer_at[2] = {};
#pragma unroll 1
    for (int d = a.row_dims - 1; d >= 0; --d) {
      const std::int64_t rest = d ? row / a.row_size[d] : 0, i = row - rest * a.row_size[d];
      row = rest;
      student += i * a.student.row_stride[d];
      teachers += i * a.teachers.row_stride[d];
      weights += i * a.weights.row_stride[d];
      student_grad += i * a.student_grad.row_stride[d];
      teachers_grad += i * a.teachers_grad.row_stride[d];
      weights_grad += i * a.weights_grad.row_stride[d];
#pragma unroll
      for (int r = 0; r < 2; ++r) row_loss[r] += i * a.row_loss[r].row_stride[d], outer_at[r] += i * a.grad_output[r].row_stride[d];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (a.grad_output[r].present) outer[r] = load_value<double>(a.grad_output[r].data, a.grad_output[r].dtype, outer_at[r]);
  }
};

// A row for a group of threads, computed in C.
template <typename C, int Lanes>
class TeacherRow {
 protected:
  using G = Group<Lanes>;
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

  // --- what is kept per teacher

  __device__ __forceinline__ C number(int name, int k) const { return static_cast<C>(exactly(name, k)); }
  __device__ __forceinline__ double exactly(int name, int k) const { return slot_[(static_cast<std::int64_t>(name) * K_ + k) * step_]; }
  __device__ __forceinline__ void keep(int name, int k, double value) {
    if (G::lane() == 0) slot_[(static_cast<std::int64_t>(name) * K_ + k) * step_] = value;
  }
  // What one thread keeps, the others read.
  __device__ __forceinline__ static void together() {
    if constexpr (Lanes == 32) __syncwarp();
    if constexpr (Lanes == kBlock) __syncthreads();
  }

  // Sums over classes, per teacher: cleared, added to by chunks of the group's classes, put together.
  __device__ __forceinline__ void clear_dots() {
    together();
    for (int i = G::lane(); i < kParts * K_; i += Lanes) slot_[(static_cast<std::int64_t>(kDot) * K_ + i) * step_] = 0;
    together();
  }
  __device__ __forceinline__ void add_dot(int k, double value) {
    if constexpr (Lanes > 1) value = Group<32>::sum(value);
    const int part = Lanes == kBlock ? static_cast<int>(threadIdx.x) / 32 : 0;
    if (Lanes == 1 || threadIdx.x % 32 == 0) slot_[(static_cast<std::int64_t>(kDot + part) * K_ + k) * step_] += value;
  }
  __device__ __forceinline__ void gather_dots() {
    together();
    if constexpr (kParts > 1) {
      for (int k = G::lane(); k < K_; k += Lanes) {
        double sum = 0;
        for (int part = 0; part < kParts; ++part) sum += exactly(kDot + part, k);
        slot_[(static_cast<std::int64_t>(kDot) * K_ + k) * step_] = sum;
      }
      together();
    }
  }

  // f(c, mine) for chunks of classes, a class per thread: all threads of the group come along, with c of the last class at most.
  template <typename F>
  __device__ __forceinline__ void each_chunk(F&& f) const {
    for (std::int64_t begin = 0; begin < a_.classes; begin += Lanes) {
      const std::int64_t c = begin + G::lane();
      f(c < a_.classes ? c : a_.classes - 1, c < a_.classes);
    }
  }

  // --- inputs

  __device__ __forceinline__ C teacher(int k, std::int64_t c) const {
    return load_value<C>(a_.teachers.data, a_.teachers.dtype, at_.teachers + k * a_.teachers.stack_stride + c * a_.teachers.class_stride);
  }
  __device__ __forceinline__ C student(std::int64_t c) const {
    return load_value<C>(a_.student.data, a_.student.dtype, at_.student + c * a_.student.class_stride);
  }
  __device__ __forceinline__ void to_student(std::int64_t c, C value) const {
    store_value<C>(a_.student_grad.data, a_.student_grad.dtype, at_.student_grad + c * a_.student_grad.class_stride, value);
  }
  __device__ __forceinline__ void to_teacher(int k, std::int64_t c, C value) const {
    const Stack& to = a_.teachers_grad;
    store_value<C>(to.data, to.dtype, at_.teachers_grad + k * to.stack_stride + c * to.class_stride, value);
  }
  __device__ __forceinline__ void to_weight(int k, std::int64_t c, double value) const {
    const Stack& to = a_.weights_grad;
    store_value<double>(to.data, to.dtype, at_.weights_grad + k * to.stack_stride + c * to.class_stride, value);
  }

  __device__ __forceinline__ double weight(int k, std::int64_t c) const { return weight_of(a_, at_.weights, k, c); }
  // A teacher's share at class c, whose weights sum to `sum` (looked at where weights differ between classes).
  __device__ __forceinline__ C share(int k, std::int64_t c, double sum) const {
    if (!a_.by_class) return number(kShare, k);
    return static_cast<C>(sum == 0 ? 1.0 / K_ : weight(k, c) / sum);
  }
  __device__ __forceinline__ double sum_at(std::int64_t c) const { return a_.by_class ? weight_sum(a_, at_.weights, c) : 0.0; }

  __device__ void find_shares() {
    together();  // the last row's numbers are no longer read
    if (a_.by_class) return;
    total_ = weight_sum(a_, at_.weights, 0);
    for (int k = 0; k < K_; ++k) keep(kShare, k, total_ == 0 ? 1.0 / K_ : weight(k, 0) / total_);
    together();
  }

  __device__ void find_student() {
    Softmax<C> soft;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const C x[1] = {student(c)};
      soft.template add<1>(x, inverse_t_);
    }
    soft.template gather<G>(inverse_t_);
    student_ = soft;
    student_inverse_ = static_cast<C>(1 / soft.sum);
    student_log_sum_ = logarithm(static_cast<C>(soft.sum));
  }

  // With kDot the derivative toward each share: those of the weights, w_k / sum w.
  __device__ void weight_gradients(double factor) {
    if (!a_.weights_grad.present || a_.by_class) return;
    double mean = 0;
    for (int k = 0; k < K_; ++k) mean += exactly(kShare, k) == 0 ? 0.0 : exactly(kShare, k) * exactly(kDot, k);
    for (int k = G::lane(); k < K_; k += Lanes)
      to_weight(k, 0, total_ == 0 || exactly(kShare, k) == 0 ? 0.0 : factor * (exactly(kDot, k) - mean) / total_);
  }
  // The softmax of a teacher without a share is not known, nor needed.
  __device__ __forceinline__ bool skipped(int k) const { return !a_.by_class && number(kShare, k) == C(0); }

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
