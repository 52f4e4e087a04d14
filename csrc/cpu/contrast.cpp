#include "fedkern/contrast.h"

#include <algorithm>
#include <limits>

#include "fedkern/parallel.h"
#include "fedkern/simd_math.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Rows that have column sums of their own, and what a thread takes at a time.
constexpr std::int64_t kChunkRows = 32;
// Rows side by side: their exponentials do not wait for each other, and a column's sum is touched once for all.
constexpr int kBeside = 4;
// Columns whose sums stay in L1 while a chunk's rows pass; a row's sum is widened after each.
constexpr std::int64_t kStrip = 1024;

double seconds(const ContrastTile& tile, double each) {
  return each * static_cast<double>(tile.rows) * static_cast<double>(tile.columns);
}

template <typename T>
FEDKERN_INLINE T* row_of(const ContrastTile& tile, std::int64_t row) {
  return static_cast<T*>(tile.data) + row * tile.stride;
}

// body(j, n) over columns [begin, end), n lanes at a time.
template <typename T, typename Body>
FEDKERN_INLINE void across(std::int64_t begin, std::int64_t end, Body&& body) {
  std::int64_t j = begin;
  for (; j + Vec<T>::lanes <= end; j += Vec<T>::lanes) body(j, std::integral_constant<int, Vec<T>::lanes>{});
  if (j < end) body(j, static_cast<std::ptrdiff_t>(end - j));
}
template <typename T, typename N>
FEDKERN_INLINE Vec<T> load(const T* p, N n, T fill = 0) {
  if constexpr (std::is_same_v<N, std::ptrdiff_t>)
    return Vec<T>::load_partial(p, n, fill);
  else
    return Vec<T>::load(p);
}
template <typename T, typename N>
FEDKERN_INLINE void store(Vec<T> x, T* p, N n) {
  if constexpr (std::is_same_v<N, std::ptrdiff_t>)
    x.store_partial(p, n);
  else
    x.store(p);
}

// body(row, count of rows side by side as a constant) over [begin, end).
template <typename Body>
FEDKERN_INLINE void beside(std::int64_t begin, std::int64_t end, Body&& body) {
  std::int64_t i = begin;
  for (; i + kBeside <= end; i += kBeside) body(i, std::integral_constant<int, kBeside>{});
  for (; i < end; ++i) body(i, std::integral_constant<int, 1>{});
}

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

// --- sums

// Maxima of the chunk's rows, and of its columns.
template <typename T>
void tops(const ContrastTile& tile, std::int64_t begin, std::int64_t end, double* row_top, T* column_top) {
  std::fill_n(column_top, tile.columns, kNothing<T>);
  beside(begin, end, [&](std::int64_t i, auto count) {
    constexpr int R = decltype(count)::value;
    Vec<T> most[R];
    for (auto& m : most) m = Vec<T>::set(kNothing<T>);
    across<T>(0, tile.columns, [&](std::int64_t j, auto n) {
      Vec<T> of_column = load(column_top + j, n, kNothing<T>);
      for (int r = 0; r < R; ++r) {
        const Vec<T> s = load(row_of<T>(tile, i + r) + j, n, kNothing<T>);
        most[r] = max(most[r], s);
        of_column = max(of_column, s);
      }
      store(of_column, column_top + j, n);
    });
    for (int r = 0; r < R; ++r) row_top[i + r] = static_cast<double>(reduce_max(most[r]));
  });
}

// What is subtracted: a row or column of -inf only adds nothing.
template <typename T>
FEDKERN_INLINE Vec<T> base_of(Vec<T> top) {
  return select(top == Vec<T>::set(kNothing<T>), Vec<T>::set(0), top);
}

// Sums of the chunk's rows into row_sum, of its columns into column_sum.
template <typename T, bool bounded, bool keep>
void add_up(const ContrastTile& tile, std::int64_t begin, std::int64_t end, const double* row_top, double* row_sum,
            const T* column_top, T* column_sum) {
  const ScaledExp<T> power(1.0 / tile.scale);
  std::fill_n(column_sum, tile.columns, T(0));
  std::fill(row_sum + begin, row_sum + end, 0.0);
  for (std::int64_t strip = 0; strip < tile.columns; strip += kStrip) {
    const std::int64_t last = std::min(strip + kStrip, tile.columns);
    beside(begin, end, [&](std::int64_t i, auto count) {
      constexpr int R = decltype(count)::value;
      Vec<T> sum[R], base[R];
      for (int r = 0; r < R; ++r) {
        sum[r] = Vec<T>::set(0);
        if constexpr (!bounded) base[r] = base_of(Vec<T>::set(static_cast<T>(row_top[i + r])));
      }
      across<T>(strip, last, [&](std::int64_t j, auto n) {
        Vec<T> of_column = load(column_sum + j, n);
        [[maybe_unused]] Vec<T> below;
        if constexpr (!bounded) below = base_of(load(column_top + j, n));
        // All loads before the first store: rows a multiple of a page apart look alike to the load queue.
        // Past the end: exponents of which nothing remains.
        Vec<T> s[R];
        for (int r = 0; r < R; ++r) s[r] = load(row_of<T>(tile, i + r) + j, n, kNothing<T>);
        for (int r = 0; r < R; ++r) {
          if constexpr (bounded) {
            s[r] = power(s[r]);
            sum[r] = sum[r] + s[r];
            of_column = of_column + s[r];
          } else {
            sum[r] = sum[r] + power(s[r] - base[r]);
            of_column = of_column + power(s[r] - below);
          }
        }
        if constexpr (keep)
          for (int r = 0; r < R; ++r) store(s[r], row_of<T>(tile, i + r) + j, n);
        store(of_column, column_sum + j, n);
      });
      for (int r = 0; r < R; ++r) row_sum[i + r] += static_cast<double>(reduce_add(sum[r]));
    });
  }
}

// Takes a chunk's columns into the whole's.
template <typename T>
void join(const ContrastTile& tile, const T* top, const T* sum, const ContrastStatistics& to) {
  if (tile.bounded) {
    for (std::int64_t j = 0; j < tile.columns; ++j) to.column_sum[j] += static_cast<double>(sum[j]);
    return;
  }
  using V = Vec<double>;
  const ScaledExp<double> power(1.0 / tile.scale);
  for (std::int64_t j = 0; j < tile.columns; j += V::lanes) {
    const std::ptrdiff_t n = std::min<std::ptrdiff_t>(V::lanes, tile.columns - j);
    const V before = V::load_partial(to.column_top + j, n), more = V::load_partial(top + j, n), whole = max(before, more);
    const V base = base_of(whole);
    const V total = V::load_partial(to.column_sum + j, n) * power(before - base) + V::load_partial(sum + j, n) * power(more - base);
    whole.store_partial(to.column_top + j, n);
    total.store_partial(to.column_sum + j, n);
  }
}

template <typename T>
void sums_as(const ContrastTile& tile, bool keep, const ContrastStatistics& to) {
  const std::int64_t chunks = (tile.rows + kChunkRows - 1) / kChunkRows;
  const Scratch<T> memory(2 * chunks * tile.columns);
  T *column_tops = memory.get(), *column_sums = column_tops + chunks * tile.columns;
  double *row_top = to.row_top + tile.first, *row_sum = to.row_sum + tile.first, *own = to.own + tile.first;
  const ScaledExp<T> power(1.0 / tile.scale);
  auto work = [&](std::int64_t begin, std::int64_t end) {
    T *top = column_tops + begin / kChunkRows * tile.columns, *sum = column_sums + begin / kChunkRows * tile.columns;
    for (std::int64_t i = begin; i < end; ++i) {
      const T s = row_of<T>(tile, i)[tile.first + i];
      own[i] = static_cast<double>(tile.bounded ? first(power(Vec<T>::set(s))) : s);
    }
    if (!tile.bounded) {
      tops(tile, begin, end, row_top, top);
      add_up<T, false, false>(tile, begin, end, row_top, row_sum, top, sum);
    } else {
      std::fill(row_top + begin, row_top + end, 0.0);
      keep ? add_up<T, true, true>(tile, begin, end, row_top, row_sum, top, sum)
           : add_up<T, true, false>(tile, begin, end, row_top, row_sum, top, sum);
    }
  };
  parallel_for(tile.rows, kChunkRows, tile.threads, seconds(tile, tile.bounded ? 6e-10 : 13e-10), work);
  for (std::int64_t c = 0; c < chunks; ++c) join(tile, column_tops + c * tile.columns, column_sums + c * tile.columns, to);
  if (tile.bounded) std::fill_n(to.column_top, tile.columns, 0.0);
}

// --- gradient

enum class From { exponentials, bounded, tops };

template <typename T, From from>
void gradient_of(const ContrastTile& tile, double factor, const T* sums) {
  const std::int64_t n_all = tile.columns;
  const T *row_top = sums, *row_sum = sums + n_all, *column_top = sums + 2 * n_all, *column_sum = sums + 3 * n_all;
  const Scratch<T> memory(2 * n_all);
  T *share = memory.get(), *below = share + n_all;
  const Vec<T> weight = Vec<T>::set(static_cast<T>(factor));
  across<T>(0, n_all, [&](std::int64_t j, auto n) {
    store(weight / load(column_sum + j, n, T(1)), share + j, n);
    if constexpr (from == From::tops) store(base_of(load(column_top + j, n)), below + j, n);
  });
  const ScaledExp<T> power(1.0 / tile.scale);
  auto work = [&](std::int64_t begin, std::int64_t end) {
    beside(begin, end, [&](std::int64_t i, auto count) {
      constexpr int R = decltype(count)::value;
      Vec<T> own[R], base[R];
      for (int r = 0; r < R; ++r) {
        own[r] = weight / Vec<T>::set(row_sum[tile.first + i + r]);
        base[r] = base_of(Vec<T>::set(row_top[tile.first + i + r]));
      }
      across<T>(0, n_all, [&](std::int64_t j, auto n) {
        const Vec<T> other = load(share + j, n);
        Vec<T> s[R];
        for (int r = 0; r < R; ++r) s[r] = load(row_of<T>(tile, i + r) + j, n);
        for (int r = 0; r < R; ++r) {
          if constexpr (from == From::exponentials)
            s[r] = s[r] * (own[r] + other);
          else if constexpr (from == From::bounded)
            s[r] = power(s[r]) * (own[r] + other);
          else
            s[r] = fma(power(s[r] - load(below + j, n)), other, power(s[r] - base[r]) * own[r]);
        }
        for (int r = 0; r < R; ++r) store(s[r], row_of<T>(tile, i + r) + j, n);
      });
      for (int r = 0; r < R; ++r) row_of<T>(tile, i + r)[tile.first + i + r] -= static_cast<T>(2 * factor);
    });
  };
  constexpr double each = from == From::exponentials ? 2e-10 : from == From::bounded ? 5e-10 : 10e-10;
  parallel_for(tile.rows, kChunkRows, tile.threads, seconds(tile, each), work);
}

template <typename T>
void gradient_as(const ContrastTile& tile, bool kept, double factor, const void* sums) {
  const T* given = static_cast<const T*>(sums);
  kept           ? gradient_of<T, From::exponentials>(tile, factor, given)
  : tile.bounded ? gradient_of<T, From::bounded>(tile, factor, given)
                 : gradient_of<T, From::tops>(tile, factor, given);
}

// --- what the caller asks beside

template <typename T>
double dot_as(std::int64_t count, const T* a, const T* b) {
  // In fp64 after every strip.
  double total = 0;
  for (std::int64_t begin = 0; begin < count; begin += kStrip) {
    Vec<T> sums[kBeside];
    for (auto& s : sums) s = Vec<T>::set(0);
    int turn = 0;
    across<T>(begin, std::min(begin + kStrip, count), [&](std::int64_t j, auto n) {
      sums[turn] = fma(load(a + j, n), load(b + j, n), sums[turn]);
      turn = (turn + 1) % kBeside;
    });
    total += static_cast<double>(reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

double dot(DType dtype, std::int64_t count, const void* a, const void* b) {
  return dtype == DType::f64 ? dot_as(count, static_cast<const double*>(a), static_cast<const double*>(b))
                             : dot_as(count, static_cast<const float*>(a), static_cast<const float*>(b));
}

template <typename T>
double largest_square_as(std::int64_t rows, std::int64_t columns, const T* data) {
  double most = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const double square = dot_as(columns, data + i * columns, data + i * columns);
    if (!(square <= most)) most = square;
    if (square != square) return square;
  }
  return most;
}

double largest_square(DType dtype, std::int64_t rows, std::int64_t columns, const void* data) {
  return dtype == DType::f64 ? largest_square_as(rows, columns, static_cast<const double*>(data))
                             : largest_square_as(rows, columns, static_cast<const float*>(data));
}

void sums(const ContrastTile& tile, bool keep, const ContrastStatistics& to) {
  tile.dtype == DType::f64 ? sums_as<double>(tile, keep, to) : sums_as<float>(tile, keep, to);
}
void gradient(const ContrastTile& tile, bool kept, double factor, const void* given) {
  tile.dtype == DType::f64 ? gradient_as<double>(tile, kept, factor, given) : gradient_as<float>(tile, kept, factor, given);
}

}  // namespace

const ContrastTable contrast_table = {sums, gradient, largest_square, dot};

}  // namespace fedkern::FEDKERN_ISA
