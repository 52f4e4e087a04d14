// Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): 16 products in place of 36 for a tile of 2x2 results.
//
// Tiles are kept as 16 planes [tiles][channels], one for each element of a transformed tile.
#pragma once

#include "conv_plan.h"
#include "conv_tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

constexpr int kPlanes = 16;

// From one plane to the next: never a multiple of 4096 bytes, which would put all of them into one set of L1.
inline std::int64_t plane_of(std::int64_t tiles, std::int64_t channels) { return tiles * channels + 16; }

// Weights [out / block][9][in][block] -> [16][out / block][in][block].
inline void transform_weights(const float* from, std::int64_t in, std::int64_t out, float* to) {
  const std::int64_t block = block_of(out), step = in * block, plane = in * out;
  const Wide half = Wide::set(0.5f);
  for (std::int64_t first = 0; first < plane; first += step, from += 9 * step)
    for (std::int64_t i = 0; i < step; i += Wide::lanes) {
      Wide r[4][3];
      for (int b = 0; b < 3; ++b) {
        const Wide g0 = Wide::load(from + b * step + i), g1 = Wide::load(from + (3 + b) * step + i), g2 = Wide::load(from + (6 + b) * step + i);
        const Wide even = (g0 + g2) * half, odd = g1 * half;
        r[0][b] = g0, r[1][b] = even + odd, r[2][b] = even - odd, r[3][b] = g2;
      }
      for (int a = 0; a < 4; ++a) {
        const Wide even = (r[a][0] + r[a][2]) * half, odd = r[a][1] * half;
        float* const at = to + 4 * a * plane + first + i;
        r[a][0].store(at), (even + odd).store(at + plane), (even - odd).store(at + 2 * plane), r[a][2].store(at + 3 * plane);
      }
    }
}

// A band of a map with its border -> its tiles.
inline void transform_map(const float* x, std::int64_t row, const Band& band, std::int64_t channels, float* to, std::int64_t plane) {
  for (std::int64_t i = band.begin; i < band.end; i += 2)
    for (std::int64_t j = 0; j < band.width; j += 2, to += channels)
      for (std::int64_t c = 0; c < channels; c += Wide::lanes) {
        const float* const at = x + i * row + j * channels + c;
        Wide t[4][4];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
          const Wide d0 = Wide::load(at + b * channels), d1 = Wide::load(at + row + b * channels);
          const Wide d2 = Wide::load(at + 2 * row + b * channels), d3 = Wide::load(at + 3 * row + b * channels);
          t[0][b] = d0 - d2, t[1][b] = d1 + d2, t[2][b] = d2 - d1, t[3][b] = d1 - d3;
        }
        float* out = to + c;
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a, out += 4 * plane) {
          (t[a][0] - t[a][2]).store(out), (t[a][1] + t[a][2]).store(out + plane);
          (t[a][2] - t[a][1]).store(out + 2 * plane), (t[a][1] - t[a][3]).store(out + 3 * plane);
        }
      }
}

// A gradient's tiles, from a band of a map with its border.
inline void transform_gradient(const float* d, std::int64_t row, const Band& band, std::int64_t channels, float* to, std::int64_t plane) {
  for (std::int64_t i = band.begin; i < band.end; i += 2)
    for (std::int64_t j = 0; j < band.width; j += 2, to += channels)
      for (std::int64_t c = 0; c < channels; c += Wide::lanes) {
        const float* const at = d + (i + 1) * row + (j + 1) * channels + c;
        const Wide d00 = Wide::load(at), d01 = Wide::load(at + channels), d10 = Wide::load(at + row), d11 = Wide::load(at + row + channels);
        const Wide zero = Wide::set(0);
        const Wide left[4] = {d00, d00 + d10, d00 - d10, zero - d10}, right[4] = {d01, d01 + d11, d01 - d11, zero - d11};
        float* out = to + c;
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a, out += 4 * plane) {
          left[a].store(out), (left[a] + right[a]).store(out + plane);
          (left[a] - right[a]).store(out + 2 * plane), (zero - right[a]).store(out + 3 * plane);
        }
      }
}

// Products [16][tiles][block] -> a band's results, of `block` channels of `step`. Returns whether all are finite: tiles spread an
// infinity over results that do not depend on it.
inline bool transform_back(const float* from, std::int64_t plane, std::int64_t block, const Band& band, float* y, std::int64_t step) {
  const std::int64_t row = band.width * step;
  const Wide zero = Wide::set(0);
  Wide left_off = zero, right_off = zero;
  for (std::int64_t i = band.begin; i < band.end; i += 2)
    for (std::int64_t j = 0; j < band.width; j += 2, from += block)
      for (std::int64_t c = 0; c < block; c += Wide::lanes) {
        Wide r[2][4];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
          const float* const at = from + b * plane + c;
          const Wide m0 = Wide::load(at), m1 = Wide::load(at + 4 * plane), m2 = Wide::load(at + 8 * plane), m3 = Wide::load(at + 12 * plane);
          r[0][b] = m0 + m1 + m2, r[1][b] = m1 - m2 - m3;
        }
        float* const to = y + i * row + j * step + c;
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
          if (i + a >= band.end) break;
          const Wide left = r[a][0] + r[a][1] + r[a][2], right = r[a][1] - r[a][2] - r[a][3];
          left.store(to + a * row);
          if (j + 1 < band.width) right.store(to + a * row + step);
          left_off = fma(left, zero, left_off), right_off = fma(right, zero, right_off);
        }
      }
  return !(!(left_off + right_off == zero)).any();
}

// [tiles][in] times [in][block] -> [tiles][block]. In the products that matter `in` is a constant, so that tiles are at constant
// distances.
template <int P, int N, int IN>
void product(const float* x, std::int64_t tiles, std::int64_t given, const float* weight, float* out) {
  constexpr std::int64_t block = N * Wide::lanes;
  const std::int64_t in = IN ? IN : given;
  std::int64_t t = 0;
  for (; t + P <= tiles; t += P) product_tile<Wide, P, N>(x + t * in, 0, in, 1, in, weight, out + t * block, block);
  for (; t + 4 <= tiles; t += 4) product_tile<Wide, 4, N>(x + t * in, 0, in, 1, in, weight, out + t * block, block);
  for (; t < tiles; ++t) product_tile<Wide, 1, N>(x + t * in, 0, in, 1, in, weight, out + t * block, block);
}

using Product = void (*)(const float* x, std::int64_t tiles, std::int64_t in, const float* weight, float* out);
template <int P, int N>
Product product_of(std::int64_t in) {
  switch (in) {
    case 16: return product<P, N, 16>;
    case 32: return product<P, N, 32>;
    case 64: return product<P, N, 64>;
    case 128: return product<P, N, 128>;
    default: return product<P, N, 0>;
  }
}
inline Product product_of(std::int64_t in, std::int64_t block) {
#if defined(FEDKERN_ISA_avx512)
  return block == Wide::lanes ? product_of<16, 1>(in) : product_of<8, 2>(in);
#else
  (void)block;  // channels come in sixteens
  return product_of<4, 2>(in);
#endif
}

// Tiles of a band of `samples` samples, as transform_map leaves them -> their results. `products`: [16][tiles][block] of memory.
// `done` hears of every block of channels of a sample: (where it begins, its first channel). Returns whether all are finite.
template <typename Done>
FEDKERN_INLINE bool multiply(const float* tiles, std::int64_t samples, const Band& band, std::int64_t map, std::int64_t in, std::int64_t out,
                             const float* weight, float* products, float* y, Done&& done) {
  const std::int64_t count = samples * band.tiles(), block = block_of(out);
  const std::int64_t from = plane_of(count, in), to = plane_of(count, block);
  const Product product = product_of(in, block);
  bool finite = true;
  for (std::int64_t c = 0; c < out; c += block, weight += in * block) {
    for (int e = 0; e < kPlanes; ++e) product(tiles + e * from, count, in, weight + e * in * out, products + e * to);
    for (std::int64_t n = 0; n < samples; ++n) {
      finite &= transform_back(products + n * band.tiles() * block, to, block, band, y + n * map + c, out);
      done(y + n * map + band.begin * band.width * out + c, c);
    }
  }
  return finite;
}

template <int K, int N>
void outer(const float* x, std::int64_t in, const float* d, std::int64_t out, std::int64_t tiles, float* to, bool first) {
  for (std::int64_t c = 0; c < out; c += N * Wide::lanes)
    for (std::int64_t k = 0; k < in; k += K)
      outer_tile<Wide, K, 1, N>({x + k, 0, in}, 0, {d + c, 0, out}, 1, tiles, to + k * out + c, out, 0, first);
}

// Adds the transformed gradient of the weights, [16][in][out]; the `first` sets it.
inline void add_outer(const float* x, const float* d, std::int64_t tiles, const ConvShape& s, float* to, bool first) {
  for (int e = 0; e < kPlanes; ++e, x += plane_of(tiles, s.in), d += plane_of(tiles, s.out), to += s.in * s.out) {
#if defined(FEDKERN_ISA_avx512)
    if (s.out % 32)
      outer<16, 1>(x, s.in, d, s.out, tiles, to, first);
    else
      outer<8, 2>(x, s.in, d, s.out, tiles, to, first);
#else
    outer<4, 2>(x, s.in, d, s.out, tiles, to, first);
#endif
  }
}

// [16][in][out] -> [9][in][out], in the same memory.
inline void transform_weights_back(float* w, std::int64_t step) {
  const Wide half = Wide::set(0.5f);
  for (std::int64_t i = 0; i < step; i += Wide::lanes) {
    Wide r[3][4];
    for (int b = 0; b < 4; ++b) {
      const float* const at = w + b * step + i;
      const Wide m0 = Wide::load(at), m1 = Wide::load(at + 4 * step), m2 = Wide::load(at + 8 * step), m3 = Wide::load(at + 12 * step);
      const Wide even = (m1 + m2) * half;
      r[0][b] = m0 + even, r[1][b] = (m1 - m2) * half, r[2][b] = even + m3;
    }
    for (int a = 0; a < 3; ++a) {
      const Wide even = (r[a][1] + r[a][2]) * half;
      float* const at = w + 3 * a * step + i;
      (r[a][0] + even).store(at), ((r[a][1] - r[a][2]) * half).store(at + step), (even + r[a][3]).store(at + 2 * step);
    }
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
