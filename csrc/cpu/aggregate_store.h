// Sums divided and written out in the result's type.
#pragma once

#include <limits>

#include "fedkern/aggregate.h"
#include "stream.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements that are read in one run.
inline constexpr std::int64_t kChunk = 65536;

// Seconds that moving `bytes` takes on one thread, roughly.
inline double seconds(double bytes) { return bytes * 0.6e-10; }

// Asks for the `bytes` that begin kAhead after `from`. Prefetchers in hardware follow some ten streams side by side or lose
// them all, by a factor of three, as the physical addresses have it; asked for, the lines come in either case. Never a
// fault, also past the end.
inline constexpr std::int64_t kAhead = 2048;
template <std::int64_t bytes, int level = 3>  // 3: into L1, 2: into L2
FEDKERN_INLINE void prefetch_ahead(const void* from) {
  for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(from) + kAhead + line, 0, level);
}

// Division by the weights' sum. The mean of ten vectors often lies half-way between two numbers of a shorter type, where the last
// bit of a double decides. So the product with the reciprocal is corrected where there is a fused multiply-add: a quotient that is
// a double comes out as it is (Markstein, IBM J. Res. Dev. 34(1), 1990), in a quarter of a division's time.
struct Divisor {
  double total, inverse;
  bool multiply;
  // In `exact` results also numbers count whose corrections underflow.
  Divisor(double value, bool exact)
      : total(value), inverse(1.0 / value), multiply(kFused && !exact && value > 0x1p-500 && value < 0x1p500) {}
  FEDKERN_INLINE double apply(double x) const { return x / total; }
  FEDKERN_INLINE Vec<double> apply(Vec<double> x) const {
    using V = Vec<double>;
    if (!multiply) return x / V::set(total);
    const V factor = V::set(inverse), rough = x * factor;
    return select(abs(rough) < V::set(std::numeric_limits<double>::infinity()), fma(fma(rough, V::set(-total), x), factor, rough), rough);
  }

 private:
#if defined(FEDKERN_ISA_avx2) || defined(FEDKERN_ISA_avx512)
  static constexpr bool kFused = true;
#else
  static constexpr bool kFused = false;
#endif
};
struct Undivided {
  template <typename V>
  FEDKERN_INLINE V apply(V x) const {
    return x;
  }
};

// Results larger than the last-level cache are written past it: they would only push out what is still to be read.
inline bool can_stream(const void* out, bool wanted) {
#if defined(FEDKERN_ISA_avx2) || defined(FEDKERN_ISA_avx512)
  return wanted && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
#else
  return false && out && wanted;
#endif
}

FEDKERN_INLINE void store_past_cache(Vec<double> x, float* out) {
#if defined(FEDKERN_ISA_avx512)
  _mm256_stream_ps(out, _mm512_cvtpd_ps(x.v));
#elif defined(FEDKERN_ISA_avx2)
  _mm_stream_ps(out, _mm256_cvtpd_ps(x.v));
#else
  x.store(out);
#endif
}
FEDKERN_INLINE void store_past_cache(Vec<double> x, double* out) {
#if defined(FEDKERN_ISA_avx512)
  _mm512_stream_pd(out, x.v);
#elif defined(FEDKERN_ISA_avx2)
  _mm256_stream_pd(out, x.v);
#else
  x.store(out);
#endif
}

// out[i] = held[i] over the divisor.
template <int count, typename Out, typename D>
FEDKERN_INLINE void write_held(const Vec<double>* held, const D& divisor, Out* out, bool stream) {
  constexpr int lanes = Vec<double>::lanes;
  if constexpr (sizeof(Out) > 2) {
    if (stream)
      for (int u = 0; u < count; ++u) store_past_cache(divisor.apply(held[u]), out + u * lanes);
    else
      for (int u = 0; u < count; ++u) divisor.apply(held[u]).store(out + u * lanes);
  } else {
    for (int u = 0; u < count; u += 2)
      round_to_odd(divisor.apply(held[u]), divisor.apply(held[u + 1])).store(out + u * lanes);
  }
}

// out[i] = sum[i] over the divisor for i < n.
template <typename Out, typename D>
inline void write_mean(const double* sum, std::int64_t n, const D& divisor, Out* out, bool stream) {
  using V = Vec<double>;
  constexpr int count = 8;
  constexpr std::int64_t step = count * V::lanes;
  std::int64_t i = 0;
  for (; i + step <= n; i += step) {
    V held[count];
    for (int u = 0; u < count; ++u) held[u] = V::load(sum + i + u * V::lanes);
    write_held<count>(held, divisor, out + i, stream);
  }
  for (; i < n; ++i) {
    const double mean = divisor.apply(sum[i]);
    narrow_tile(&mean, 1, out + i);
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
