// The sum in fp64 that keeps what rounding takes away; aggregate.h says what it holds.
#pragma once

#include <cmath>

#include "aggregate_lanes.h"
#include "aggregate_store.h"
#include "aggregate_streams.h"
#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements whose sums wait in L2 where there are more vectors than are read side by side, or no memory for sums. The sums
// are streams, too.
constexpr std::int64_t kWaiting = 16384;
constexpr int kBesideSums = 5;

// Whether two values have differed in any bit so far.
struct Difference {
#if defined(FEDKERN_ISA_avx512)
  __m512i bits = _mm512_setzero_si512();
  FEDKERN_INLINE void note(Vec<double> a, Vec<double> b) {
    bits = _mm512_ternarylogic_epi64(bits, _mm512_castpd_si512(a.v), _mm512_castpd_si512(b.v), 0xf6);  // bits | (a ^ b)
  }
  FEDKERN_INLINE bool any() const { return _mm512_test_epi64_mask(bits, bits) != 0; }
#elif defined(FEDKERN_ISA_avx2)
  __m256i bits = _mm256_setzero_si256();
  FEDKERN_INLINE void note(Vec<double> a, Vec<double> b) {
    bits = _mm256_or_si256(bits, _mm256_xor_si256(_mm256_castpd_si256(a.v), _mm256_castpd_si256(b.v)));
  }
  FEDKERN_INLINE bool any() const { return !_mm256_testz_si256(bits, bits); }
#else
  using Bits = Native<double>::bits;
  Bits bits{};
  FEDKERN_INLINE void note(Vec<double> a, Vec<double> b) { bits |= (Bits)a.v ^ (Bits)b.v; }
  FEDKERN_INLINE bool any() const { return (bits[0] | bits[1]) != 0; }
#endif
};

// Rounded once, and never -0: where a sum of such products is exact, its differences have the bits of its parts.
FEDKERN_INLINE Vec<double> product(Vec<double> weight, Vec<double> x) { return fma(weight, x, Vec<double>::set(0.0)); }

// Knuth's TwoSum: a becomes the rounded sum; returns what rounding took away. C is double or Vec<double>.
template <typename C>
FEDKERN_INLINE C two_sum(C& a, C b) {
  const C sum = a + b, own = sum - b, other = sum - own;
  const C lost = (a - own) + (b - other);
  a = sum;
  return lost;
}

// The rests of the block that holds element i; `make`: where it has none so far, they begin at zero. Else null.
inline double* rests_at(const ErrorFreeSum& a, std::int64_t i, bool make) {
  std::int32_t& slot = a.slots[i / kErrorFreeBlock];
  if (slot < 0) {
    if (!make) return nullptr;
    slot = static_cast<std::int32_t>(__atomic_fetch_add(a.used, std::int64_t{1}, __ATOMIC_RELAXED));
    std::memset(a.rests + slot * kErrorFreeBlock, 0, kErrorFreeBlock * sizeof(double));
  }
  return a.rests + slot * kErrorFreeBlock + i % kErrorFreeBlock;
}

// One product of vector m to the sum of element i.
inline void add_product(const ErrorFreeSum& a, std::int64_t m, std::int64_t i, double product, double& sum) {
  if (!std::isfinite(product) || !std::isfinite(sum + product)) {
    __atomic_store_n(a.odd + m, std::int8_t{1}, __ATOMIC_RELAXED);
    return;
  }
  const double lost = two_sum(sum, product);
  if (lost == 0) return;
  const double more = two_sum(*rests_at(a, i, true), lost);
  if (more != 0) a.note(a.context, i, more);
}

template <typename T>
void add_products(const ErrorFreeSum& a, std::int64_t first, std::int64_t count, std::int64_t begin, std::int64_t n, double* sum) {
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t m = first; m < first + count; ++m) {
      const T x = static_cast<const T*>(a.vectors[m].data)[begin + i];
      add_product(a, m, begin + i, a.weights[m] * static_cast<double>(widen(x)) + 0.0, sum[i]);
    }
}

// For elements in which a sum was not exact: what rounding takes away goes to their rests. n is whole registers.
template <typename T>
__attribute__((noinline)) void add_with_rests(const ErrorFreeSum& a, std::int64_t first, std::int64_t count, std::int64_t begin, std::int64_t n,
                                              double* sum) {
  using V = Vec<double>;
  for (std::int64_t i = 0; i < n; i += V::lanes) {
    const double* const old = rests_at(a, begin + i, false);
    V total = V::load(sum + i), rest = old ? V::load(old) : V::set(0.0);
    Difference lost, kept;
    for (std::int64_t m = first; m < first + count; ++m) {
      const V x = V::load(static_cast<const T*>(a.vectors[m].data) + begin + i);
      lost.note(two_sum(rest, two_sum(total, product(V::set(a.weights[m]), x))), V::set(0.0));  // NaN of what is not finite, too
    }
    if (lost.any()) {
      add_products<T>(a, first, count, begin + i, V::lanes, sum + i);
      continue;
    }
    total.store(sum + i);
    kept.note(rest, V::set(0.0));
    if (old || kept.any()) rest.store(rests_at(a, begin + i, true));
  }
}

// out = (sum + rests) / divisor for elements of one block.
template <typename Out>
__attribute__((noinline)) void write_whole(const ErrorFreeSum& a, std::int64_t begin, std::int64_t n, const double* sum, const Divisor& divisor, Out* out,
                                           bool stream) {
#if defined(__GNUC__)
  asm("" : "+r"(n));  // where n is known, GCC warns of the loop over what is left of it
#endif
  const double* const rest = rests_at(a, begin, false);
  if (!rest) return write_mean(sum, n, divisor, out, stream);
  double whole[kErrorFreeBlock];
  for (std::int64_t i = 0; i < n; ++i) whole[i] = sum[i] + rest[i];
  write_mean(whole, n, divisor, out, false);
}

// Adds `count` <= kStreams vectors from vector `first` on to the sums of elements [begin, begin + n); with `out`, writes the
// means instead of sums.
template <typename T, typename Out>
void add_exactly(const ErrorFreeSum& a, std::int64_t first, std::int64_t count, std::int64_t begin, std::int64_t n, bool fresh, double* sum,
                 const Divisor& divisor, Out* out, bool stream) {
  using V = Vec<double>;
  constexpr int kHeld = Lanes<T>::held;
  constexpr std::int64_t step = kHeld * V::lanes;
  static_assert(kErrorFreeBlock % step == 0);
  const T* x[kStreams];
  double weight[kStreams];
  for (std::int64_t m = 0; m < count; ++m) x[m] = static_cast<const T*>(a.vectors[first + m].data) + begin, weight[m] = a.weights[first + m];
  std::int64_t j = 0;
  for (; j + step <= n; j += step) {
    V held[kHeld];
    for (int u = 0; u < kHeld; ++u) held[u] = fresh ? V::set(0.0) : V::load(sum + j + u * V::lanes);
    Lanes<T>::from_order(held);
    // A sum s = a + b is exact if and only if s - a == b and s - b == a. Where anything is not finite, these differ, too.
    Difference left, right;
#pragma GCC unroll 10
    for (int m = 0; m < kStreams; ++m) {
      if (m >= count) break;
      const T* from = x[m] + j;
#if defined(__GNUC__)
      asm("" : "+r"(from));
#endif
      prefetch_ahead<step * static_cast<std::int64_t>(sizeof(T)), 2>(from);
      const V w = V::set(weight[m]);
      Lanes<T>::each(from, [&](int u, V value) __attribute__((always_inline)) {
        const V add = product(w, value), next = held[u] + add;
        left.note(next - held[u], add);
        right.note(next - add, held[u]);
        held[u] = next;
        keep_order();
      });
    }
    left.bits |= right.bits;
    if (left.any()) {
      if (fresh) std::memset(sum + j, 0, step * sizeof(double));
      add_with_rests<T>(a, first, count, begin + j, step, sum + j);
      if (out) write_whole(a, begin + j, step, sum + j, divisor, out + j, false);
      continue;
    }
    Lanes<T>::to_order(held);
    if (out && a.slots[(begin + j) / kErrorFreeBlock] < 0) {
      write_held<kHeld>(held, divisor, out + j, stream);
      continue;
    }
    for (int u = 0; u < kHeld; ++u) held[u].store(sum + j + u * V::lanes);
    if (out) write_whole(a, begin + j, step, sum + j, divisor, out + j, false);
  }
  if (j == n) return;
  if (fresh) std::memset(sum + j, 0, (n - j) * sizeof(double));
  add_products<T>(a, first, count, begin + j, n - j, sum + j);
  if (out) write_whole(a, begin + j, n - j, sum + j, divisor, out + j, false);
}

template <typename T, typename Out>
void error_free_sum(const ErrorFreeSum& a) {
  const Divisor divisor(a.total, true);
  const bool stream = a.out.present && can_stream(a.out.data, a.stream);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    alignas(64) double waiting[kWaiting];
    for (std::int64_t i = begin; i < end; i += kWaiting) {
      const std::int64_t n = std::min(kWaiting, end - i);
      double* const sum = a.sum.present ? a.sum.data + i : waiting;
      Out* const out = a.out.present ? static_cast<Out*>(a.out.data) + i : nullptr;
      for (std::int64_t m = 0, next = 0; m < a.count; m = next) {
        next = std::min<std::int64_t>(m + (a.sum.present ? kBesideSums : kStreams), a.count);
        add_exactly<T>(a, m, next - m, i, n, a.fresh && m == 0, sum, divisor, next == a.count ? out : nullptr, stream);
      }
      if (!a.count && out)
        for (std::int64_t j = 0; j < n; j += kErrorFreeBlock)
          write_whole(a, i + j, std::min(kErrorFreeBlock, n - j), sum + j, divisor, out + j, stream);
    }
    if (stream) finish_stores();
  };
  const double each = static_cast<double>(a.count * sizeof(T) + (a.sum.present ? 16 : 0) + (a.out.present ? sizeof(Out) : 0));
  parallel_for(a.size, vector_chunk(a.size), a.threads, seconds(static_cast<double>(a.size) * each), chunks);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
