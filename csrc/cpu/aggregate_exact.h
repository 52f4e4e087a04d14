// The accumulator whose bits do not depend on the order of arrival; aggregate.h says what it holds.
#pragma once

#include <cmath>
#include <limits>

#include "aggregate_store.h"
#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Toward zero; |x| < 2^33.
FEDKERN_INLINE double chop(double x) {
#if defined(FEDKERN_ISA_avx2) || defined(FEDKERN_ISA_avx512)
  return __builtin_trunc(x);
#else
  return static_cast<double>(static_cast<std::int64_t>(x));
#endif
}

// An integer of less than 2^51, as plain additions that every level vectorises.
FEDKERN_INLINE std::int64_t whole(double x) { return bit_cast<std::int64_t>(x + 0x1.8p52) - bit_cast<std::int64_t>(0x1.8p52); }

// 2^power for -1022 <= power <= 1023.
FEDKERN_INLINE double power_of_two(std::int64_t power) { return bit_cast<double>((power + 1023) << 52); }

// The digit that a product's leading bit falls into; kExactInfinity for infinities and NaN.
FEDKERN_INLINE std::int64_t digit_of(double product) {
  const std::int64_t exponent = (bit_cast<std::int64_t>(product) >> 52) & 0x7ff;
  const std::int64_t digit = ((exponent + 1) >> 5) - 32;
  return digit < kExactLowest ? kExactLowest : digit;
}

// Makes room for `product` in element i; products of an element that left the finite numbers become zero.
inline void raise(const ExactState& state, std::int64_t i, double& product) {
  std::int64_t digit = digit_of(product), top = state.top[i];
  if (digit == kExactInfinity) {
    const std::int8_t code = std::isnan(product) ? kExactNaN : product > 0 ? kExactInfinity : kExactMinusInfinity;
    state.top[i] = top < kExactInfinity || top == code ? code : kExactNaN;
  } else if (digit > top) {
    const std::int64_t rise = digit - top;
    state.low[i] = rise == 1 ? state.middle[i] : rise == 2 ? state.high[i] : 0;
    state.middle[i] = rise == 1 ? state.high[i] : 0;
    state.high[i] = 0;
    state.top[i] = static_cast<std::int8_t>(digit);
  }
  if (state.top[i] >= kExactInfinity) state.high[i] = state.middle[i] = state.low[i] = 0, product = 0;
}

inline void deposit(const ExactState& state, std::int64_t begin, std::int64_t n, double* product) {
  const std::int8_t* top = state.top + begin;
  int rises = 0;
  for (std::int64_t i = 0; i < n; ++i) rises |= (digit_of(product[i]) > top[i]) | (top[i] >= kExactInfinity);
  if (rises)
    for (std::int64_t i = 0; i < n; ++i) raise(state, begin + i, product[i]);
  std::int64_t *__restrict high = state.high + begin, *__restrict middle = state.middle + begin, *__restrict low = state.low + begin;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t digit = std::min<std::int64_t>(top[i], 31);
    const double scaled = product[i] * power_of_two(-32 * digit);
    const double first = chop(scaled), rest = (scaled - first) * 0x1p32;
    const double second = chop(rest), third = chop((rest - second) * 0x1p32);
    high[i] += whole(first);
    middle[i] += whole(second);
    low[i] += whole(third);
  }
}

// The sum of element i in units of 2^(32 top), and its sign taken out so that equal sums of opposite sign round alike.
FEDKERN_INLINE double exact_sum(std::int64_t high, std::int64_t middle, std::int64_t low) {
  constexpr std::int64_t digit = 0xffffffff;
  std::int64_t carried = middle + (low >> 32);
  const bool negative = high + (carried >> 32) < 0;
  if (negative) high = -high, middle = -middle, low = -low;
  carried = middle + (low >> 32);
  const double top = static_cast<double>(high + (carried >> 32));
  const double rest = static_cast<double>(carried & digit) * 0x1p-32 + static_cast<double>(low & digit) * 0x1p-64;
  return negative ? -(top + rest) : top + rest;
}

template <typename T>
void exact_add(const ExactAdd& a) {
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    double product[kTile];
    for (std::int64_t i = begin; i < end; i += kTile) {
      const std::int64_t n = std::min(kTile, end - i);
      const T* x = static_cast<const T*>(a.vector.data) + i * a.vector.stride;
      if (a.vector.stride == 1)
        widen_tile(x, n, product);
      else
        for (std::int64_t j = 0; j < n; ++j) product[j] = static_cast<double>(widen(x[j * a.vector.stride]));
      for (std::int64_t j = 0; j < n; ++j) product[j] *= a.weight;
      deposit(a.state, i, n, product);
    }
  };
  parallel_for(a.size, vector_chunk(a.size), a.threads, seconds(static_cast<double>(a.size) * 54), chunks);
}

template <typename T>
void exact_mean(const ExactMean& a) {
  const bool stream = can_stream(a.out, a.stream);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    double mean[kTile];
    const ExactState& s = a.state;
    for (std::int64_t i = begin; i < end; i += kTile) {
      const std::int64_t n = std::min(kTile, end - i);
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t top = s.top[i + j];
        if (top >= kExactInfinity) {
          mean[j] = top == kExactNaN ? std::numeric_limits<double>::quiet_NaN()
                                     : (top == kExactInfinity ? 1.0 : -1.0) * std::numeric_limits<double>::infinity();
        } else {
          const double half = power_of_two(16 * top);
          // Scaled on both sides of the division, which by a weight near either end of the range would overflow or cut digits off.
          mean[j] = exact_sum(s.high[i + j], s.middle[i + j], s.low[i + j]) * half / a.total * half;
        }
      }
      write_mean(mean, n, Undivided{}, static_cast<T*>(a.out) + i, stream);
    }
    if (stream) finish_streams();
  };
  parallel_for(a.size, vector_chunk(a.size), a.threads, seconds(static_cast<double>(a.size) * 60), chunks);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
