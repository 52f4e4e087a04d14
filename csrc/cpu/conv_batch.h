// A batch's convolution, by whichever kernel its plan says, and what passes over a batch have in common.
#pragma once

#include <bit>
#include <cmath>

#include "conv_direct.h"
#include "conv_winograd.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// For convolutions whose results nobody looks at while they are in cache.
constexpr auto nothing = [](auto...) {};

// A batch's convolution with weights as pack() or pack_back() left them, one group of samples after another.
class Convolution {
 public:
  Convolution(const ConvPlan& plan, std::int64_t in, std::int64_t out, const float* packed)
      : plan_(plan), in_(in), out_(out), packed_(packed), transformed_(plan.winograd ? kPlanes * in * out : 0) {
    if (plan.winograd) transform_weights(packed, in, out, transformed_.get());
  }

  // Floats that each thread works in: transformed tiles, and their products.
  static std::int64_t tiles(const ConvPlan& plan, std::int64_t channels) { return plan.winograd ? kPlanes * plane_of(plan.tiles, channels) : 0; }
  static std::int64_t products(const ConvPlan& plan, std::int64_t out) { return tiles(plan, block_of(out)); }

  // Of a map with its border.
  template <typename Done>
  FEDKERN_INLINE void direct(const float* map, float* y, Done&& done) const {
    const ConvShape &s = plan_.shape, &r = plan_.result;
    const DirectConv conv(in_, out_, r.width, s.stride * in_, s.kernel, s.kernel);
    conv.run(map, plan_.in_row, {s.stride * plan_.in_row, s.stride * in_, r.width * out_, out_}, r.height, r.width, packed_, y, done);
  }
  // Of a gradient with its border, back to x.
  FEDKERN_INLINE void direct_back(const float* map, float* x) const {
    const ConvShape &s = plan_.shape, &r = plan_.result;
    const std::int64_t row = plan_.out_row;
    if (s.stride == 1 || s.kernel == 1) {
      if (s.stride > 1) std::fill_n(x, s.height * s.width * out_, 0.0f);
      const ConvSteps steps{row, in_, s.stride * s.width * out_, s.stride * out_};
      DirectConv(in_, out_, r.width, in_, s.kernel, s.kernel).run(s.kernel == 1 ? map + row + in_ : map, row, steps, r.height, r.width, packed_, x, nothing);
      return;
    }
    const float* weight = packed_;
    for (const int down : {0, 1})
      for (const int across : {0, 1}) {
        const DirectConv conv(in_, out_, (s.width + 1 - across) / 2, in_, 1 + down, 1 + across);
        conv.run(map + row + in_, row, {row, in_, 2 * s.width * out_, 2 * out_}, (s.height + 1 - down) / 2, (s.width + 1 - across) / 2, weight,
                 x + (down * s.width + across) * out_, nothing);
        weight += conv.weights();
      }
  }
  template <typename Done>
  FEDKERN_INLINE bool winograd(const float* tiles, std::int64_t samples, const Band& band, float* products, float* y, Done&& done) const {
    return multiply(tiles, samples, band, plan_.shape.height * plan_.shape.width * out_, in_, out_, transformed_.get(), products, y, done);
  }

 private:
  const ConvPlan& plan_;
  std::int64_t in_, out_;
  const float* packed_;
  Scratch<float> transformed_;
};

// Work of a pass of so many products with the weights.
inline double seconds(const ConvPlan& p, int products) {
  const double maps = static_cast<double>(p.shape.positions() * p.shape.in + p.result.positions() * p.shape.out);
  return products * (2e-11 * static_cast<double>(p.result.positions() * p.weights()) + 1e-10 * maps);
}

// Exponents are compared: products would have to wait for each other.
inline bool all_finite(const float* x, std::int64_t size) {
  std::uint32_t most = 0;
  for (std::int64_t i = 0; i < size; ++i) most = std::max(most, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu);
  return most < 0x7f800000u;
}
inline bool all_finite(const Scratch<double>& x, std::int64_t size, int worker = 0) {
  return std::all_of(x.get(worker), x.get(worker) + size, [](double value) { return std::isfinite(value); });
}

// Adds what pieces have summed up, `size` numbers each, to that of the first: in their order.
template <typename T>
void add_pieces(T* sums, std::int64_t size, std::int64_t pieces) {
  for (std::int64_t piece = 1; piece < pieces; ++piece)
    for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[size * piece + i];
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
