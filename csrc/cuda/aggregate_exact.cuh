// The accumulator whose bits do not depend on the order of arrival; aggregate.h says what it holds.
#pragma once

#include <cmath>

#include "fedkern/aggregate.h"
#include "group.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

// 2^power for -1022 <= power <= 1023.
__device__ __forceinline__ double power_of_two(std::int64_t power) { return __longlong_as_double((power + 1023) << 52); }

// The digit that a product's leading bit falls into; kExactInfinity for infinities and NaN.
__device__ __forceinline__ int digit_of(double product) {
  const int exponent = static_cast<int>(__double_as_longlong(product) >> 52) & 0x7ff, digit = ((exponent + 1) >> 5) - 32;
  return digit < kExactLowest ? kExactLowest : digit;
}

__global__ void __launch_bounds__(kBlock) exact_add_kernel(DType dtype, std::int64_t size, const void* x, std::int64_t stride, double weight,
                                                           ExactState state) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < size; i += step) {
    double product = load_value<double>(x, dtype, i * stride) * weight;
    std::int64_t high = state.high[i], middle = state.middle[i], low = state.low[i];
    int top = state.top[i];
    const int digit = digit_of(product);
    if (digit == kExactInfinity) {
      const int code = product != product ? kExactNaN : product > 0 ? kExactInfinity : kExactMinusInfinity;
      top = top < kExactInfinity || top == code ? code : kExactNaN;
    } else if (digit > top) {  // makes room for it
      const int rise = digit - top;
      low = rise == 1 ? middle : rise == 2 ? high : 0;
      middle = rise == 1 ? high : 0;
      high = 0;
      top = digit;
    }
    if (top >= kExactInfinity) {  // an element that left the finite numbers has no digits
      high = middle = low = 0;
    } else {
      const double scaled = product * power_of_two(-32 * static_cast<std::int64_t>(top));
      const double first = trunc(scaled), rest = (scaled - first) * 0x1p32;
      const double second = trunc(rest), third = trunc((rest - second) * 0x1p32);
      high += static_cast<std::int64_t>(first);
      middle += static_cast<std::int64_t>(second);
      low += static_cast<std::int64_t>(third);
    }
    state.high[i] = high, state.middle[i] = middle, state.low[i] = low;
    state.top[i] = static_cast<std::int8_t>(top);
  }
}

// The sum in units of 2^(32 top), its sign taken out so that equal sums of opposite sign round alike.
__device__ __forceinline__ double exact_sum(std::int64_t high, std::int64_t middle, std::int64_t low) {
  constexpr std::int64_t digit = 0xffffffff;
  const bool negative = high + ((middle + (low >> 32)) >> 32) < 0;
  if (negative) high = -high, middle = -middle, low = -low;
  const std::int64_t carried = middle + (low >> 32);
  const double top = static_cast<double>(high + (carried >> 32));
  const double rest = __dadd_rn(__dmul_rn(static_cast<double>(carried & digit), 0x1p-32), __dmul_rn(static_cast<double>(low & digit), 0x1p-64));
  return negative ? -(top + rest) : top + rest;
}

__global__ void __launch_bounds__(kBlock) exact_mean_kernel(DType out_dtype, std::int64_t size, ExactState state, double total, void* out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < size; i += step) {
    const int top = state.top[i];
    double mean;
    if (top >= kExactInfinity) {
      mean = top == kExactNaN ? static_cast<double>(NAN) : top == kExactInfinity ? static_cast<double>(INFINITY) : -static_cast<double>(INFINITY);
    } else {
      const double half = power_of_two(16 * static_cast<std::int64_t>(top));
      mean = exact_sum(state.high[i], state.middle[i], state.low[i]) * half / total * half;
    }
    store_value<double>(out, out_dtype, i, mean);
  }
}

}  // namespace
}  // namespace fedkern::cuda
