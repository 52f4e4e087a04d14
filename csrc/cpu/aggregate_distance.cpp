#include "fedkern/aggregate_distance.h"

#include "aggregate_scratch.h"
#include "aggregate_store.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

using V = Vec<double>;

// Elements of all vectors that are widened at once: eight vectors of them fill two thirds of L1.
constexpr std::int64_t kSpan = 512;
// Vectors of one side of a tile of pairs, whose sums are held in registers.
#if defined(FEDKERN_ISA_avx512)
constexpr int kSide = 4;
#else
constexpr int kSide = 2;
#endif

// sums[i][k] += |a_i - b_k|^2 over kSpan elements.
FEDKERN_INLINE void add_pairs(const double* const* a, const double* const* b, double (*sums)[kSide]) {
  V held[kSide][kSide];
  for (int i = 0; i < kSide; ++i)
    for (int k = 0; k < kSide; ++k) held[i][k] = V::set(0);
  for (std::int64_t j = 0; j < kSpan; j += V::lanes) {
    V other[kSide];
    for (int k = 0; k < kSide; ++k) other[k] = V::load(b[k] + j);
    for (int i = 0; i < kSide; ++i) {
      const V own = V::load(a[i] + j);
      for (int k = 0; k < kSide; ++k) {
        const V difference = own - other[k];
        held[i][k] = fma(difference, difference, held[i][k]);
      }
    }
  }
  for (int i = 0; i < kSide; ++i)
    for (int k = 0; k < kSide; ++k) sums[i][k] = reduce_add(held[i][k]);
}

template <typename T>
void pairs(const PairDistances& a) {
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    // A span that is not full ends in zeros, which are at no distance from each other.
    const Scratch<double> memory(a.count * kSpan);
    double* wide = memory.get();
    double* partial = a.partial + begin / a.chunk * a.count * a.count;
    for (std::int64_t at = begin; at < end; at += kSpan) {
      const std::int64_t n = std::min(kSpan, end - at);
      for (std::int64_t m = 0; m < a.count; ++m) {
        double* row = wide + m * kSpan;
        widen_tile(static_cast<const T*>(a.vectors[m]) + at, n, row);
        for (std::int64_t j = n; j < kSpan; ++j) row[j] = 0;
      }
      for (std::int64_t i = 0; i < a.count; i += kSide) {
        for (std::int64_t k = 0; k <= i; k += kSide) {
          const double *own[kSide], *other[kSide];
          for (int u = 0; u < kSide; ++u) {
            own[u] = wide + std::min(i + u, a.count - 1) * kSpan;
            other[u] = wide + std::min(k + u, a.count - 1) * kSpan;
          }
          double sums[kSide][kSide];
          add_pairs(own, other, sums);
          for (int u = 0; u < kSide && i + u < a.count; ++u)
            for (int v = 0; v < kSide && k + v < i + u; ++v) partial[(i + u) * a.count + k + v] += sums[u][v];
        }
      }
    }
  };
  const double each = static_cast<double>(a.count) * (static_cast<double>(a.count) * 0.6e-10 + 2e-10);
  parallel_for(a.size, a.chunk, a.threads, each * static_cast<double>(a.size), chunks);
}

// |x - point|^2 of n elements.
template <bool origin, typename T>
FEDKERN_INLINE double squared(const T* x, const double* point, std::int64_t n) {
  constexpr int held = 4;
  constexpr std::int64_t step = held * V::lanes;
  V sums[held];
  for (V& sum : sums) sum = V::set(0);
  std::int64_t j = 0;
  for (; j + step <= n; j += step)
    for (int u = 0; u < held; ++u) {
      V value = V::load(x + j + u * V::lanes);
      if constexpr (!origin) value = value - V::load(point + j + u * V::lanes);
      sums[u] = fma(value, value, sums[u]);
    }
  double sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < n; ++j) {
    const double value = static_cast<double>(widen(x[j])) - (origin ? 0.0 : point[j]);
    sum += value * value;
  }
  return sum;
}

template <typename T>
void to_point(const PointDistances& a) {
  // Vectors one after another, so that short ones share the work too.
  const std::int64_t each = (a.size + a.chunk - 1) / a.chunk;
  auto chunks = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; ++c) {
      const std::int64_t m = c / each, begin = c % each * a.chunk, n = std::min(a.chunk, a.size - begin);
      const T* x = static_cast<const T*>(a.vectors[m]) + begin;
      a.partial[c % each * a.count + m] = a.point ? squared<false>(x, a.point + begin, n) : squared<true, T>(x, nullptr, n);
    }
  };
  const double bytes = static_cast<double>(a.count) * static_cast<double>(a.size) * sizeof(T);
  parallel_for(each * a.count, 1, a.threads, seconds(bytes), chunks);
}

void pairs_any(const PairDistances& a) {
  with_type(a.dtype, [&](auto in) { pairs<decltype(in)>(a); });
}
void to_point_any(const PointDistances& a) {
  with_type(a.dtype, [&](auto in) { to_point<decltype(in)>(a); });
}

}  // namespace

const AggregateDistanceTable aggregate_distance_table = {pairs_any, to_point_any};

}  // namespace fedkern::FEDKERN_ISA
