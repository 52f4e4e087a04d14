#include "fedkern/blend.h"

#include <algorithm>

#include "blend_boxes.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "stream.h"

namespace fedkern::FEDKERN_ISA {
namespace {

double alpha_at(const Alpha& alpha, std::int64_t b) { return alpha.each.present ? alpha.each.data[b * alpha.stride] : alpha.value; }

// The background row that sample b meets.
template <typename Call>
std::int64_t partner(const Call& a, std::int64_t b) {
  return a.index.present ? a.index.data[b] : b;
}

template <typename T>
T* at(const Rows& rows, std::int64_t row, std::int64_t column) {
  return static_cast<T*>(rows.data) + row * rows.stride + column;
}

// Applies op(x, y) to n elements in the type they are computed in; y may be null.
template <typename T, typename Op>
void map(const T* __restrict x, const T* __restrict y, T* __restrict out, std::int64_t n, Op op) {
  using C = computed_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    if (y)
      for (std::int64_t i = 0; i < n; ++i) out[i] = op(x[i], y[i]);
    else
      for (std::int64_t i = 0; i < n; ++i) out[i] = op(x[i], C{0});
  } else {
    C a[kTile], b[kTile] = {};
    for (std::int64_t i = 0; i < n; i += kTile) {
      const std::int64_t m = std::min(kTile, n - i);
      widen_tile(x + i, m, a);
      if (y) widen_tile(y + i, m, b);
      for (std::int64_t j = 0; j < m; ++j) a[j] = op(a[j], b[j]);
      narrow_tile(a, m, out + i);
    }
  }
}

// Elements put together in L1 before they are written past the caches.
constexpr std::int64_t kStreamTile = 2048;

template <typename T, typename Op>
void map(const T* x, const T* y, T* out, std::int64_t n, bool stream, Op op) {
  if (!stream) return map(x, y, out, n, op);
  alignas(64) T tile[kStreamTile];
  for (std::int64_t i = 0; i < n; i += kStreamTile) {
    const std::int64_t m = std::min(kStreamTile, n - i);
    map(x + i, y ? y + i : y, tile, m, op);
    stream_row(tile, m, out + i);
  }
}

template <typename T>
void put(const T* from, std::int64_t n, T* to, bool stream) {
  stream ? stream_row(from, n, to) : static_cast<void>(std::copy_n(from, n, to));
}

// Seconds that `bytes` take on one thread, roughly.
double seconds(std::int64_t bytes) { return static_cast<double>(bytes) * 1e-10; }

// Runs body(row, chunk) over rows x chunks-of-a-row, in pieces of about one chunk.
template <typename Body>
void for_chunks(std::int64_t rows, std::int64_t size, int threads, double estimate, Body&& body) {
  const std::int64_t chunks = blend_chunks(size);
  auto units = [&](std::int64_t begin, std::int64_t end) {
    std::int64_t row = begin / chunks, chunk = begin % chunks;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      body(row, chunk);
      if (++chunk == chunks) chunk = 0, ++row;
    }
  };
  parallel_for(rows * chunks, std::max<std::int64_t>(1, kBlendChunk / std::max<std::int64_t>(size, 1)), threads, estimate, units);
}

template <typename T>
void forward(const BlendForward& a) {
  using C = computed_t<T>;
  for_chunks(a.rows, a.size, a.threads, seconds(3 * a.rows * a.size * sizeof(T)), [&](std::int64_t b, std::int64_t chunk) {
    const double alpha = alpha_at(a.alpha, b);
    const C weight = static_cast<C>(alpha), rest = static_cast<C>(1.0 - alpha);
    const std::int64_t column = chunk * kBlendChunk, n = std::min(kBlendChunk, a.size - column);
    map(at<T>(a.foreground, b, column), at<T>(a.background, partner(a, b), column), at<T>(a.out, b, column), n,
        a.stream, [=](C x, C y) { return weight * x + rest * y; });
    if (a.stream) finish_streams();
  });
}

// sum of grad * (foreground - background) over one chunk, in fp64 and in an order that no ISA level changes.
template <typename T>
double dot(const T* grad, const T* x, const T* y, std::int64_t n) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {}, g[kTile], a[kTile], b[kTile];
  for (std::int64_t i = 0; i < n; i += kTile) {
    const std::int64_t m = std::min(kTile, n - i), whole = m - m % kLanes;
    widen_tile(grad + i, m, g);
    widen_tile(x + i, m, a);
    widen_tile(y + i, m, b);
    for (std::int64_t j = 0; j < whole; j += kLanes)
      for (int k = 0; k < kLanes; ++k) lane[k] += g[j + k] * (a[j + k] - b[j + k]);
    for (std::int64_t j = whole; j < m; ++j) lane[j - whole] += g[j] * (a[j] - b[j]);
  }
  double sum = 0;
  for (double value : lane) sum += value;
  return sum;
}

// Samples whose gradients are summed at once.
constexpr std::int64_t kUsers = 8;

// sum (+)= rest[0] * grad[0] + rest[1] * grad[1] + ... in fp64, one after another.
template <typename T>
void add_users(const T* const* grad, const double* rest, std::int64_t users, std::int64_t n, bool first, double* __restrict sum) {
  using V = Vec<double>;
  constexpr int kWide = 4;
  std::int64_t i = 0;
  for (; i + kWide * V::lanes <= n; i += kWide * V::lanes) {
    V total[kWide];
    for (int v = 0; v < kWide; ++v) total[v] = first ? V::set(0) : V::load(sum + i + v * V::lanes);
    for (std::int64_t k = 0; k < users; ++k) {
      const V by = V::set(rest[k]);
      for (int v = 0; v < kWide; ++v) total[v] = total[v] + by * V::load(grad[k] + i + v * V::lanes);
    }
    for (int v = 0; v < kWide; ++v) total[v].store(sum + i + v * V::lanes);
  }
  for (; i < n; ++i) {
    double total = first ? 0 : sum[i];
    for (std::int64_t k = 0; k < users; ++k) total += rest[k] * static_cast<double>(widen(grad[k][i]));
    sum[i] = total;
  }
}

template <typename T>
void backward(const BlendBackward& a) {
  using C = computed_t<T>;
  const std::int64_t chunks = blend_chunks(a.size);

  // What belongs to sample b alone: its foreground's gradient, and its part of alpha's.
  auto scaled = [&](std::int64_t b, std::int64_t column, std::int64_t n, double alpha) {
    const C weight = static_cast<C>(alpha);
    if (a.grad_foreground.present)
      map(at<T>(a.grad, b, column), static_cast<const T*>(nullptr), at<T>(a.grad_foreground, b, column), n, a.stream,
          [=](C g, C) { return weight * g; });
  };
  auto product = [&](std::int64_t b, std::int64_t chunk, std::int64_t column, std::int64_t n) {
    if (a.grad_alpha.present)
      a.partial[b * chunks + chunk] =
          dot(at<T>(a.grad, b, column), at<T>(a.foreground, b, column), at<T>(a.background, partner(a, b), column), n);
  };

  const std::int64_t passes = 1 + a.grad_foreground.present + a.grad_background.present + 2 * a.grad_alpha.present;
  const double estimate = seconds(passes * std::max(a.rows, a.background_rows) * a.size * static_cast<std::int64_t>(sizeof(T)));
  if (!a.grad_background.present) {
    for_chunks(a.rows, a.size, a.threads, estimate, [&](std::int64_t b, std::int64_t chunk) {
      const std::int64_t column = chunk * kBlendChunk;
      const std::int64_t n = std::min(kBlendChunk, a.size - column);
      scaled(b, column, n, alpha_at(a.alpha, b));
      product(b, chunk, column, n);
      if (a.stream) finish_streams();
    });
  } else {
    // Walking the background rows visits every sample once, gathers without atomics, and finds the gradient that
    // grad_foreground has just read still in cache.
    const T nothing[kTile] = {};
    for_chunks(a.background_rows, a.size, a.threads, estimate, [&](std::int64_t row, std::int64_t chunk) {
      const std::int64_t column = chunk * kBlendChunk, n = std::min(kBlendChunk, a.size - column);
      const bool listed = a.start.present;
      const std::int64_t begin = listed ? a.start.data[row] : row, end = listed ? a.start.data[row + 1] : row + 1;
      T* out = at<T>(a.grad_background, row, column);
      if (end == begin) {
        for (std::int64_t i = 0; i < n; i += kTile) put(nothing, std::min(kTile, n - i), out + i, a.stream);
      } else if (end == begin + 1) {
        const std::int64_t b = listed ? a.order[begin] : row;
        const double alpha = alpha_at(a.alpha, b);
        const C rest = static_cast<C>(1.0 - alpha);
        scaled(b, column, n, alpha);
        product(b, chunk, column, n);
        map(at<T>(a.grad, b, column), static_cast<const T*>(nullptr), out, n, a.stream,
            [=](C g, C) { return rest * g; });
      } else {
        // Sample by sample: results that are written past the cache in turns of a few lines take several times as long.
        for (std::int64_t k = begin; k < end; ++k) {
          scaled(a.order[k], column, n, alpha_at(a.alpha, a.order[k]));
          product(a.order[k], chunk, column, n);
        }
        alignas(64) T rounded[kStreamTile];
        double sum[kTile];
        std::int64_t waiting = 0;
        for (std::int64_t i = 0; i < n; i += kTile) {
          const std::int64_t m = std::min(kTile, n - i);
          for (std::int64_t k = begin; k < end; k += kUsers) {
            const T* grad[kUsers];
            double rest[kUsers];
            const std::int64_t users = std::min(kUsers, end - k);
            for (std::int64_t u = 0; u < users; ++u) {
              grad[u] = at<T>(a.grad, a.order[k + u], column + i);
              rest[u] = 1.0 - alpha_at(a.alpha, a.order[k + u]);
            }
            add_users(grad, rest, users, m, k == begin, sum);
          }
          narrow_tile(sum, m, a.stream ? rounded + waiting : out + i);
          if (a.stream && ((waiting += m) == kStreamTile || i + m == n)) {
            stream_row(rounded, waiting, out + i + m - waiting);
            waiting = 0;
          }
        }
      }
      if (a.stream) finish_streams();
    });
  }
  if (a.grad_alpha.present)
    for (std::int64_t b = 0; b < a.rows; ++b) {
      double sum = 0;
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[b * chunks + chunk];
      a.grad_alpha.data[b] = sum;
    }
}

void forward_any(const BlendForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void backward_any(const BlendBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace

const BlendTable blend_table = {forward_any, backward_any, box_mask, box_fill_any};

}  // namespace fedkern::FEDKERN_ISA
