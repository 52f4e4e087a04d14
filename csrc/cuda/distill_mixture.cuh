// A class of K teachers: their weights, the terms of their mixture's divergence.
#pragma once

#include "distill_math.cuh"
#include "distill_rows.cuh"
#include "fedkern/distill_ensemble_cuda.h"

namespace fedkern::cuda {

// The logarithm of a mixture's probability, which is a normal number.
template <typename C>
__device__ __forceinline__ C log_of(C m) {
  constexpr C tiny = static_cast<C>(sizeof(C) == 8 ? 1e-300 : 1e-37);
  return logarithm(m > tiny || m != m ? m : tiny);
}

// What a slot keeps per teacher.
enum SlotNumber { kShare, kMaximum, kInverse, kLogSum, kWeight, kDot };  // kWeight: kShare in fp64; kDot: once per warp of the row

// A weight before it is normalised.
__device__ __forceinline__ double weight_of(const EnsembleCall& a, std::int64_t at, int k, std::int64_t c) {
  if (a.mask.present && !a.mask.data[k * a.mask_stride[0] + c * a.mask_stride[1]]) return 0;
  if (!a.weights.present) return 1;
  return load_value<double>(a.weights.data, a.weights.dtype, at + k * a.weights.stack_stride + c * a.weights.class_stride);
}

// Weights by class are rare, and needed in many places: called.
static __device__ __noinline__ double weight_sum(const EnsembleCall& a, std::int64_t at, std::int64_t c) {
  double sum = 0;
#pragma unroll 1
  for (int k = 0; k < static_cast<int>(a.count); ++k) sum += weight_of(a, at, k, c);
  return sum;
}

// A teacher's share at a class whose weights sum to `sum`.
static __device__ __noinline__ double share_of(const EnsembleCall& a, std::int64_t at, int k, std::int64_t c, double sum) {
  return sum == 0 ? 1.0 / static_cast<double>(a.count) : weight_of(a, at, k, c) / sum;
}
static __device__ __noinline__ void store_weight_gradient(const Stack& to, std::int64_t at, double value) {
  store_value<double>(to.data, to.dtype, at, value);
}

}  // namespace fedkern::cuda
