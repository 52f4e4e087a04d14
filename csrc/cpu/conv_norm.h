// What conv does beside the convolution: statistics, and normalisation, ReLU, pooling and residual in both directions.
#pragma once

#include "conv_plan.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Positions of a map that passes over one vector of channels after another take at a time: they stay in L1. Sums of so many are
// floats, sums of those doubles.
inline std::int64_t stretch(std::int64_t channels) { return std::max<std::int64_t>(16, 4096 / channels); }

template <typename V>
FEDKERN_INLINE void add_to(V x, double* to) {
  float lanes[V::lanes];
  x.store(lanes);
  for (int i = 0; i < V::lanes; ++i) to[i] += static_cast<double>(lanes[i]);
}

// --- statistics

// Adds sums of y - shift and of its squares, of so many channels, `step` from position to position.
template <typename V>
FEDKERN_INLINE void add_statistics(const float* y, std::int64_t positions, std::int64_t step, std::int64_t channels, const float* shift, double* sum,
                                   double* squares) {
  for (std::int64_t c = 0; c < channels; c += V::lanes) {
    const V from = V::load(shift + c);
    V s = V::set(0), q = V::set(0);
    for (std::int64_t i = 0; i < positions; ++i) {
      const V d = V::load(y + i * step + c) - from;
      s = s + d, q = fma(d, d, q);
    }
    add_to(s, sum + c), add_to(q, squares + c);
  }
}

// --- forward

// The ReLU keeps NaN: the maximum of zero and NaN is what comes second.
template <bool relu, typename V>
FEDKERN_INLINE V rectified(V z) {
  if constexpr (relu)
    return max(V::set(0), z);
  else
    return z;
}

template <bool relu, typename V>
void normalise(const float* y, const float* residual, std::int64_t positions, std::int64_t channels, const float* a, const float* b, float* out) {
  const std::int64_t all = positions * channels, some = stretch(channels) * channels;
  for (std::int64_t first = 0; first < all; first += some)
    for (std::int64_t c = 0; c < channels; c += V::lanes) {
      const V scale = V::load(a + c), shift = V::load(b + c);
      for (std::int64_t i = first + c; i < std::min(first + some, all); i += channels) {
        V z = fma(V::load(y + i), scale, shift);
        if (residual) z = z + V::load(residual + i);
        rectified<relu>(z).store(out + i);
      }
    }
}

// raw: what of y the maxima come from, or null. The first of equal values counts, and NaN more than any number.
template <bool relu, typename V>
void normalise_and_pool(const float* y, const ConvShape& s, const float* a, const float* b, float* raw, float* out) {
  const std::int64_t C = s.out, row = s.width * C;
  for (std::int64_t i = 0; i + 1 < s.height; i += 2)
    for (std::int64_t j = 0; j + 1 < s.width; j += 2, out += C) {
      const float* const at = y + i * row + j * C;
      for (std::int64_t c = 0; c < C; c += V::lanes) {
        const V scale = V::load(a + c), shift = V::load(b + c);
        const V y0 = V::load(at + c), rest[3] = {V::load(at + C + c), V::load(at + row + c), V::load(at + row + C + c)};
        V from = y0, most = fma(y0, scale, shift);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const V z = fma(rest[k], scale, shift);
          const auto more = (z > most) | !(z == z);
          most = select(more, z, most), from = select(more, rest[k], from);
        }
        rectified<relu>(most).store(out + c);
        if (raw) from.store(raw + c);
      }
      if (raw) raw += C;
    }
}

// --- backward

// What a channel's gradient is made of.
struct Coefficients {
  const float *mean, *a, *b;   // of the forward pass, [out]
  const float *slope, *offset;  // the gradient of y is a g + slope y + offset
};

// Where a ReLU passes a gradient: also at NaN, as PyTorch's.
template <bool relu, typename V>
FEDKERN_INLINE V passed(V g, V z) {
  if constexpr (relu)
    return select(rectified<true>(z) == V::set(0), V::set(0), g);
  else
    return g;
}

// Adds sums of the gradient behind the ReLU, and of its products with y - mean: over the pooled map, or over the whole one.
// `out`, where a residual was added, tells what passed.
template <bool relu, typename V>
void reduce(const float* g, const float* y, const float* out, std::int64_t positions, std::int64_t channels, const Coefficients& k, double* sum,
            double* products) {
  const std::int64_t all = positions * channels, some = stretch(channels) * channels;
  for (std::int64_t first = 0; first < all; first += some)
    for (std::int64_t c = 0; c < channels; c += V::lanes) {
      const V mean = V::load(k.mean + c), a = V::load(k.a + c), b = V::load(k.b + c);
      V s = V::set(0), p = V::set(0);
      for (std::int64_t i = first + c; i < std::min(first + some, all); i += channels) {
        const V value = V::load(y + i);
        const V grad = passed<relu>(V::load(g + i), out ? V::load(out + i) : fma(value, a, b));
        s = s + grad, p = fma(grad, value - mean, p);
      }
      add_to(s, sum + c), add_to(p, products + c);
    }
}

// The gradient of y, of a sample, into a map with its border; to_residual: null, or the gradient behind the ReLU.
template <bool relu, typename V>
void spread(const float* g, const float* y, const float* out, const ConvShape& s, const Coefficients& k, float* d, std::int64_t d_row, float* to_residual) {
  const std::int64_t C = s.out;
  for (std::int64_t i = 0; i < s.height; ++i)
    for (std::int64_t j = 0; j < s.width; ++j) {
      const std::int64_t at = (i * s.width + j) * C;
      float* const to = d + (i + 1) * d_row + (j + 1) * C;
      for (std::int64_t c = 0; c < C; c += V::lanes) {
        const V value = V::load(y + at + c), a = V::load(k.a + c);
        const V grad = passed<relu>(V::load(g + at + c), out ? V::load(out + at + c) : fma(value, a, V::load(k.b + c)));
        if (to_residual) grad.store(to_residual + at + c);
        fma(grad, a, fma(value, V::load(k.slope + c), V::load(k.offset + c))).store(to + c);
      }
    }
}

// The same through the pooling: the gradient goes to the first value of a window that is its maximum's.
template <bool relu, typename V>
void spread_pooled(const float* g, const float* y, const float* raw, const ConvShape& s, const Coefficients& k, float* d, std::int64_t d_row) {
  const std::int64_t C = s.out, row = s.width * C;
  const auto plain = [&](std::int64_t i, std::int64_t j) {  // what no window covers
    for (std::int64_t c = 0; c < C; c += V::lanes)
      fma(V::load(y + i * row + j * C + c), V::load(k.slope + c), V::load(k.offset + c)).store(d + (i + 1) * d_row + (j + 1) * C + c);
  };
  for (std::int64_t i = 0; i + 1 < s.height; i += 2) {
    for (std::int64_t j = 0; j + 1 < s.width; j += 2, g += C, raw += C) {
      const float* const at = y + i * row + j * C;
      float* const to = d + (i + 1) * d_row + (j + 1) * C;
      for (std::int64_t c = 0; c < C; c += V::lanes) {
        const V slope = V::load(k.slope + c), offset = V::load(k.offset + c), a = V::load(k.a + c), from = V::load(raw + c);
        const V grad = passed<relu>(V::load(g + c), fma(from, a, V::load(k.b + c))) * a;
        const V y0 = V::load(at + c), y1 = V::load(at + C + c), y2 = V::load(at + row + c), y3 = V::load(at + row + C + c);
        const auto is0 = y0 == from, is1 = y1 == from, is2 = y2 == from;
        const V after0 = select(is0, V::set(0), grad), after1 = select(is1, V::set(0), after0);
        (fma(y0, slope, offset) + select(is0, grad, V::set(0))).store(to + c);
        (fma(y1, slope, offset) + select(is1, after0, V::set(0))).store(to + C + c);
        (fma(y2, slope, offset) + select(is2, after1, V::set(0))).store(to + d_row + c);
        (fma(y3, slope, offset) + select(is2, V::set(0), after1)).store(to + d_row + C + c);
      }
    }
    if (s.width % 2) plain(i, s.width - 1), plain(i + 1, s.width - 1);
  }
  if (s.height % 2)
    for (std::int64_t j = 0; j < s.width; ++j) plain(s.height - 1, j);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
