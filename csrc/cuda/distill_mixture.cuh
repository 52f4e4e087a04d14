// A class of K teachers: their weights, their mixture, its term of the divergence.
#pragma once

#include "distill_math.cuh"
#include "distill_rows.cuh"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern::cuda {

// KL's terms where u = log Q - log P is known; where P is 0 Q alone counts.
template <typename C>
struct MixtureTerm {
  C value, difference;

  __device__ __forceinline__ MixtureTerm(C p, C q, C u) {
    u = p > C(0) ? u : C(2);
    const bool small = fabs(u) < small_exponent<C>();
    const C remainder = u * u * exp_remainder(u);
    difference = q - p;
    value = small ? p * remainder : fma(-p, u, difference);
    difference = small ? p * (u + remainder) : difference;
  }
};

// What a slot keeps per teacher: names are followed by all teachers' numbers.
enum SlotNumber { kShare, kMaximum, kInverse, kLogSum, kDot };  // kDot: once per warp that works on the row

// A weight before it is normalised.
__device__ __forceinline__ double weight_of(const EnsembleCall& a, std::int64_t at, int k, std::int64_t c) {
  if (a.mask.present && !a.mask.data[k * a.mask_stride[0] + c * a.mask_stride[1]]) return 0;
  if (!a.weights.present) return 1;
  return load_value<double>(a.weights.data, a.weights.dtype, at + k * a.weights.stack_stride + c * a.weights.class_stride);
}

// The inner loops are functions that are called: they are needed in many places, and are most of the code.
static __device__ __noinline__ double weight_sum(const EnsembleCall& a, std::int64_t at, std::int64_t c) {
  double sum = 0;
#pragma unroll 1
  for (int k = 0; k < static_cast<int>(a.count); ++k) sum += weight_of(a, at, k, c);
  return sum;
}

// The teachers' mixture at a class, over e^lift: the sum of share times p.
template <typename C>
__device__ __noinline__ C mixture(const EnsembleCall& a, std::int64_t teachers, std::int64_t weights, const double* slot, std::int64_t step,
                                           std::int64_t c, double sum, C lift) {
  const int K = static_cast<int>(a.count);
  const C inverse_t = static_cast<C>(a.kind == EnsembleKind::probs ? 1 / a.temperature : 1.0);
  C m = 0;
#pragma unroll 2
  for (int k = 0; k < K; ++k) {
    const auto number = [&](int name) { return static_cast<C>(slot[(static_cast<std::int64_t>(name) * K + k) * step]); };
    const C x = load_value<C>(a.teachers.data, a.teachers.dtype, teachers + k * a.teachers.stack_stride + c * a.teachers.class_stride);
    const C w = !a.by_class ? number(kShare) : static_cast<C>(sum == 0 ? 1.0 / K : weight_of(a, weights, k, c) / sum);
    const C p = exponential((x - number(kMaximum)) * inverse_t - lift) * number(kInverse);
    m += w == C(0) ? C(0) : w * p;
  }
  return m;
}

// The logarithm of the largest p that counts at a class.
template <typename C>
__device__ __noinline__ C largest_logarithm(const EnsembleCall& a, std::int64_t teachers, std::int64_t weights, const double* slot, std::int64_t step,
                                            std::int64_t c, double sum) {
  const int K = static_cast<int>(a.count);
  const C inverse_t = static_cast<C>(a.kind == EnsembleKind::probs ? 1 / a.temperature : 1.0);
  C most = -infinity<C>();
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    const auto number = [&](int name) { return static_cast<C>(slot[(static_cast<std::int64_t>(name) * K + k) * step]); };
    if (a.by_class ? sum != 0 && weight_of(a, weights, k, c) == 0 : number(kShare) == C(0)) continue;
    const C x = load_value<C>(a.teachers.data, a.teachers.dtype, teachers + k * a.teachers.stack_stride + c * a.teachers.class_stride);
    const C value = (x - number(kMaximum)) * inverse_t - number(kLogSum);
    most = value > most ? value : most;
  }
  return most;
}

}  // namespace fedkern::cuda
