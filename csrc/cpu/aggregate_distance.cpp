#include "fedkern/aggregate_distance.h"

#include "aggregate_store.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

using V = Vec<double>;

// Elements of all vectors that are widened at once: eight vectors of them fill half of L1.
constexpr std::int64_t kSpan = 256;
// Vectors of one side of a tile of pairs, whose sums are held in registers.
#if defined(FEDKERN_ISA_avx512)
constexpr int kSide = 4;
#else
constexpr int kSide = 2;
#endif

// a - b, with equal infinities at no distance. Every lane pays for the comparison, so only sums that came out NaN are taken again
// with `equal_infinities`.
template <bool equal_infinities>
FEDKERN_INLINE V difference(V a, V b) {
  if constexpr (equal_infinities) return select(a == b, V::set(0), a - b);
  return a - b;
}

// sums[i * count + k] += |a_i - b_k|^2 over kSpan elements, i < rows and k < kSide, or k < i only where `own` (then b is a).
template <int rows, bool own, bool equal_infinities>
FEDKERN_INLINE void add_pairs(const double* a, const double* b, double* sums, std::int64_t count) {
  constexpr int columns = own ? rows : kSide;
  V held[rows][columns];
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < (own ? i : columns); ++k) held[i][k] = V::set(0);
  for (std::int64_t j = 0; j < kSpan; j += V::lanes) {
    V other[columns];
    for (int k = 0; k < columns; ++k) other[k] = V::load(b + k * kSpan + j);
    for (int i = 0; i < rows; ++i) {
      const V mine = own ? other[i] : V::load(a + i * kSpan + j);
      for (int k = 0; k < (own ? i : columns); ++k) {
        const V apart = difference<equal_infinities>(mine, other[k]);
        held[i][k] = fma(apart, apart, held[i][k]);
      }
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < (own ? i : columns); ++k) sums[i * count + k] += reduce_add(held[i][k]);
}

// Vectors [i, i + rows) with all before them and with each other.
template <int rows, bool equal_infinities>
void add_side(const double* wide, std::int64_t i, double* partial, std::int64_t count) {
  const double* a = wide + i * kSpan;
  double* sums = partial + i * count;
  for (std::int64_t k = 0; k < i; k += kSide) add_pairs<rows, false, equal_infinities>(a, wide + k * kSpan, sums + k, count);
  if constexpr (rows > 1) add_pairs<rows, true, equal_infinities>(a, a, sums + i, count);
}

// Those that are left when sides of kSide are done.
template <bool equal_infinities, int rows = kSide - 1>
void add_rest(const double* wide, std::int64_t i, double* partial, std::int64_t count) {
  if constexpr (rows > 0) {
    if (count - i == rows)
      add_side<rows, equal_infinities>(wide, i, partial, count);
    else
      add_rest<equal_infinities, rows - 1>(wide, i, partial, count);
  }
}

// The chunk [begin, end) in partial[count, count], by way of wide[count, kSpan].
template <bool equal_infinities, typename T>
void add_chunk(const PairDistances& a, std::int64_t begin, std::int64_t end, double* wide, double* partial) {
  for (std::int64_t at = begin; at < end; at += kSpan) {
    const std::int64_t n = std::min(kSpan, end - at);
    for (std::int64_t m = 0; m < a.count; ++m) {
      double* row = wide + m * kSpan;
      const T* x = static_cast<const T*>(a.vectors[m]) + at;
      // The next span: while this one's pairs are taken, memory has nothing else to do.
      for (std::int64_t j = 0; j < kSpan; j += 64 / static_cast<std::int64_t>(sizeof(T))) __builtin_prefetch(x + kSpan + j, 0, 2);
      widen_tile(x, n, row);
      // A span that is not full ends in zeros, which are at no distance from each other.
      for (std::int64_t j = n; j < kSpan; ++j) row[j] = 0;
    }
    std::int64_t i = 0;
    for (; i + kSide <= a.count; i += kSide) add_side<kSide, equal_infinities>(wide, i, partial, a.count);
    add_rest<equal_infinities>(wide, i, partial, a.count);
  }
}

template <typename T>
void pairs(const PairDistances& a) {
  const std::int64_t sums = a.count * a.count;
  const Scratch<double> memory(a.count * kSpan, parallel_workers(a.size, a.chunk, a.threads));
  auto chunks = [&](std::int64_t begin, std::int64_t end, int worker) {
    double* const wide = memory.get(worker);
    double* const partial = a.partial + begin / a.chunk * sums;
    add_chunk<false, T>(a, begin, end, wide, partial);
    if (std::none_of(partial, partial + sums, [](double sum) { return sum != sum; })) return;
    std::fill_n(partial, sums, 0.0);
    add_chunk<true, T>(a, begin, end, wide, partial);
  };
  const double each = static_cast<double>(a.count) * (static_cast<double>(a.count) * 0.6e-10 + 2e-10);
  parallel_for(a.size, a.chunk, a.threads, each * static_cast<double>(a.size), chunks);
}

// |x - point|^2 of n elements.
template <bool origin, bool equal_infinities, typename T>
FEDKERN_INLINE double squared(const T* x, const double* point, std::int64_t n) {
  constexpr int held = 4;
  constexpr std::int64_t step = held * V::lanes;
  V sums[held];
  for (V& sum : sums) sum = V::set(0);
  std::int64_t j = 0;
  for (; j + step <= n; j += step)
    for (int u = 0; u < held; ++u) {
      V value = V::load(x + j + u * V::lanes);
      if constexpr (!origin) value = difference<equal_infinities>(value, V::load(point + j + u * V::lanes));
      sums[u] = fma(value, value, sums[u]);
    }
  double sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < n; ++j) {
    double value = static_cast<double>(widen(x[j]));
    if constexpr (!origin) value = value == point[j] ? 0.0 : value - point[j];
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
      double sum = a.point.present ? squared<false, false>(x, a.point.data + begin, n) : squared<true, false, T>(x, nullptr, n);
      if (a.point.present && sum != sum) sum = squared<false, true>(x, a.point.data + begin, n);
      a.partial[c % each * a.count + m] = sum;
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
