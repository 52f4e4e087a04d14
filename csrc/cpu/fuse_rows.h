// What fuse does to one run of elements that lie side by side, in intrinsics of the unit's ISA level.
#pragma once

#include <algorithm>

#include "fedkern/tiles.h"
#include "stream.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// scale * x + shift. Not fused: the same bits on every ISA level, and those of the reference.
template <typename C>
struct Unchanged {
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t) const { return x; }
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t, std::int64_t) const { return x; }
};
template <typename C>
struct OneChannel {
  Vec<C> scale, shift;
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t) const { return x * scale + shift; }
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t, std::int64_t) const { return x * scale + shift; }
};
template <typename C>
struct ChannelEach {
  const C *scale, *shift;
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t i) const { return x * Vec<C>::load(scale + i) + Vec<C>::load(shift + i); }
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t i, std::int64_t n) const {
    return x * Vec<C>::load_partial(scale + i, n) + Vec<C>::load_partial(shift + i, n);
  }
};

// As torch's: NaN stays NaN.
template <typename C>
FEDKERN_INLINE Vec<C> positive_part(Vec<C> x) {
  return max(Vec<C>::set(0), x);
}

// What of `grad` passes a ReLU whose argument, or result, is y.
template <typename C>
FEDKERN_INLINE Vec<C> passing(Vec<C> grad, Vec<C> y) {
  const Vec<C> zero = Vec<C>::set(0);
  return select((y < zero) | (y == zero), zero, grad);
}

// out = act(affine(x))
template <bool relu, typename C, typename T, typename Affine>
FEDKERN_INLINE void affine_row(const T* x, std::int64_t n, const Affine& affine, T* out) {
  constexpr int lanes = Vec<C>::lanes;
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int u = 0; u < 4; ++u) {
      const Vec<C> y = affine(Vec<C>::load(x + i + u * lanes), i + u * lanes);
      (relu ? positive_part(y) : y).store(out + i + u * lanes);
    }
  for (; i + lanes <= n; i += lanes) {
    const Vec<C> y = affine(Vec<C>::load(x + i), i);
    (relu ? positive_part(y) : y).store(out + i);
  }
  if (i < n) {
    const Vec<C> y = affine(Vec<C>::load_partial(x + i, n - i), i, n - i);
    (relu ? positive_part(y) : y).store_partial(out + i, n - i);
  }
}

// sum += act(affine(x)); the first map sets it.
template <bool relu, typename C, typename T, typename Affine>
FEDKERN_INLINE void add_row(const T* x, std::int64_t n, const Affine& affine, bool first, C* sum) {
  constexpr int lanes = Vec<C>::lanes;
  for (std::int64_t i = 0; i < n; i += lanes) {
    const std::int64_t m = std::min<std::int64_t>(lanes, n - i);
    Vec<C> y = m == lanes ? affine(Vec<C>::load(x + i), i) : affine(Vec<C>::load_partial(x + i, m), i, m);
    if (relu) y = positive_part(y);
    // `sum` is a tile of whole vectors.
    (first ? y : Vec<C>::load(sum + i) + y).store(sum + i);
  }
}

template <typename C, typename T>
FEDKERN_INLINE void divide_row(const C* sum, std::int64_t n, C count, T* out) {
  constexpr int lanes = Vec<C>::lanes;
  const Vec<C> divisor = Vec<C>::set(count);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) (Vec<C>::load(sum + i) / divisor).store(out + i);
  if (i < n) (Vec<C>::load(sum + i) / divisor).store_partial(out + i, n - i);
}

// The gradient that arrives at the affine: grad / count, stopped where the ReLU stops it. n is at most kTile.
template <typename C, typename T, typename Affine>
FEDKERN_INLINE void passing_row(const T* grad, const T* y, std::int64_t n, const Affine& affine, C count, C* out) {
  constexpr int lanes = Vec<C>::lanes;
  const Vec<C> divisor = Vec<C>::set(count);
  for (std::int64_t i = 0; i < n; i += lanes) {
    const std::int64_t m = std::min<std::int64_t>(lanes, n - i);
    const bool whole = m == lanes;
    Vec<C> g = whole ? Vec<C>::load(grad + i) : Vec<C>::load_partial(grad + i, m);
    if (count != 1) g = g / divisor;
    if (y) g = passing(g, whole ? affine(Vec<C>::load(y + i), i) : affine(Vec<C>::load_partial(y + i, m), i, m));
    g.store(out + i);
  }
}

// Both of these at once, where nobody else asks for what passes: out = passing * scale, for any n.
template <typename C, typename T, typename Affine, typename Scale>
FEDKERN_INLINE void passing_scaled_row(const T* grad, const T* y, std::int64_t n, const Affine& affine, C count, const Scale& scale,
                                       T* out) {
  constexpr int lanes = Vec<C>::lanes;
  const Vec<C> divisor = Vec<C>::set(count);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Vec<C> g = Vec<C>::load(grad + i);
    if (count != 1) g = g / divisor;
    if (y) g = passing(g, affine(Vec<C>::load(y + i), i));
    scale(g, i).store(out + i);
  }
  if (i < n) {
    Vec<C> g = Vec<C>::load_partial(grad + i, n - i);
    if (count != 1) g = g / divisor;
    if (y) g = passing(g, affine(Vec<C>::load_partial(y + i, n - i), i, n - i));
    scale(g, i, n - i).store_partial(out + i, n - i);
  }
}

// out = g * scale
template <typename C, typename T, typename Scale>
FEDKERN_INLINE void scaled_row(const C* g, std::int64_t n, const Scale& scale, T* out) {
  constexpr int lanes = Vec<C>::lanes;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) scale(Vec<C>::load(g + i), i).store(out + i);
  if (i < n) scale(Vec<C>::load(g + i), i, n - i).store_partial(out + i, n - i);
}

// Sums of g and g * x in fp64 over one channel's run, in sixteen lanes whatever the vector's width.
struct RunSum {
  static constexpr int kLanes = 16;
  double g[kLanes] = {}, gx[kLanes] = {};

  template <typename C, typename T>
  FEDKERN_INLINE void add(const C* grad, const T* x, std::int64_t n) {
    using V = Vec<double>;
    constexpr int count = kLanes / V::lanes;
    V sum[count], product[count];
    for (int u = 0; u < count; ++u) sum[u] = V::load(g + u * V::lanes), product[u] = V::load(gx + u * V::lanes);
    for (std::int64_t i = 0; i < n; i += kLanes)
      for (int u = 0; u < count; ++u) {
        const std::int64_t at = i + u * V::lanes, left = std::min<std::int64_t>(V::lanes, n - at);
        if (left <= 0) break;
        const bool whole = left == V::lanes;
        const V a = whole ? V::load(grad + at) : V::load_partial(grad + at, left);
        sum[u] = sum[u] + a;
        if (x) product[u] = product[u] + a * (whole ? V::load(x + at) : V::load_partial(x + at, left));
      }
    for (int u = 0; u < count; ++u) sum[u].store(g + u * V::lanes), product[u].store(gx + u * V::lanes);
  }
  static double total(const double* lane) {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lane[i];
    return sum;
  }
};

// to_g[i] += g[i], to_gx[i] += g[i] * x[i] in fp64.
template <typename C, typename T>
FEDKERN_INLINE void add_each(const C* g, const T* x, std::int64_t n, double* to_g, double* to_gx) {
  using V = Vec<double>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const V a = V::load(g + i);
    (V::load(to_g + i) + a).store(to_g + i);
    if (x) (V::load(to_gx + i) + a * V::load(x + i)).store(to_gx + i);
  }
  for (; i < n; ++i) {
    const double a = widen(g[i]);
    to_g[i] += a;
    if (x) to_gx[i] += a * static_cast<double>(widen(x[i]));
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
