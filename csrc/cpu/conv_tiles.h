// The two products that all of conv is made of, each with its sums in registers.
#pragma once

#include "conv_lanes.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// P positions, `step` numbers apart, times N vectors of output channels: of `rows` rows of x, `length` numbers of each position.
template <typename V, int P, int N>
FEDKERN_INLINE void product_tile(const float* x, std::int64_t row, std::int64_t step, int rows, std::int64_t length, const float* weight, float* out,
                                 std::int64_t out_step) {
  V sum[P][N];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[p][n] = V::set(0);
  for (int r = 0; r < rows; ++r, x += row)
    for (std::int64_t k = 0; k < length; ++k, weight += N * V::lanes) {
      V w[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) w[n] = V::load(weight + n * V::lanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const V value = V::set(x[p * step + k]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[p][n] = fma(value, w[n], sum[p][n]);
      }
    }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[p][n].store(out + p * out_step + n * V::lanes);
}

// A map whose positions are walked: floats from one row and one position to the next.
struct Walk {
  const float* data;
  std::int64_t row, step;
};

// K numbers of each of R rows of x, `x_row` apart, times N vectors of a gradient's channels, summed over rows x columns positions.
// Added to `to`, whose numbers are `out` apart and whose rows `to_row`; the `first` sets it.
template <typename V, int K, int R, int N>
FEDKERN_INLINE void outer_tile(Walk x, std::int64_t x_row, Walk d, std::int64_t rows, std::int64_t columns, float* to, std::int64_t out, std::int64_t to_row,
                               bool first) {
  V sum[R][K][N];
  const auto each = [&](auto&& body) {
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
      for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) body(r, k, n);
  };
  each([&](int r, int k, int n) { sum[r][k][n] = V::set(0); });
  for (std::int64_t i = 0; i < rows; ++i, x.data += x.row, d.data += d.row) {
    const float *xs = x.data, *ds = d.data;
    for (std::int64_t j = 0; j < columns; ++j, xs += x.step, ds += d.step) {
      V w[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) w[n] = V::load(ds + n * V::lanes);
      each([&](int r, int k, int n) { sum[r][k][n] = fma(V::set(xs[r * x_row + k]), w[n], sum[r][k][n]); });
    }
  }
  each([&](int r, int k, int n) {
    float* const at = to + r * to_row + k * out + n * V::lanes;
    (first ? sum[r][k][n] : V::load(at) + sum[r][k][n]).store(at);
  });
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
