// Direct convolution of maps with few channels, and the gradient of its weights.
#pragma once

#include <type_traits>

#include "conv_plan.h"
#include "conv_tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// A product_tile whose positions are at a constant distance where STEP is not 0, and then need no registers of their own.
template <typename V, int P, int N, int STEP>
void conv_tile(const float* x, std::int64_t row, std::int64_t step, int rows, std::int64_t length, const float* weight, float* out,
               std::int64_t out_step) {
  product_tile<V, P, N>(x, row, STEP ? STEP : step, rows, length, weight, out, out_step);
}

using ConvTile = void (*)(const float* x, std::int64_t row, std::int64_t step, int rows, std::int64_t length, const float* weight, float* out,
                          std::int64_t out_step);

template <typename V, int P, int N>
ConvTile tile_of(std::int64_t step) {
  if constexpr (std::is_same_v<V, Wide>) switch (step) {
      case 32: return conv_tile<V, P, N, 32>;
      case 64: return conv_tile<V, P, N, 64>;
    }
  switch (step) {
    case 1: return conv_tile<V, P, N, 1>;
    case 3: return conv_tile<V, P, N, 3>;
    case 8: return conv_tile<V, P, N, 8>;
    case 16: return conv_tile<V, P, N, 16>;
    default: return conv_tile<V, P, N, 0>;
  }
}

// The narrowest map that a tile fits into.
constexpr std::int64_t kLeastWidth = 4;

// Where a convolution reads and writes, in floats: from one row or position of its result to the next.
struct ConvSteps {
  std::int64_t x_row, x_step, y_row, y_step;
};

class DirectConv {
 public:
  // From `in` channels at that many rows and columns of taps to `out`, for results `width` wide.
  DirectConv(std::int64_t in, std::int64_t out, std::int64_t width, std::int64_t step, int rows = 3, int columns = 3)
      : out_(out), block_(block_of(out)), rows_(rows), length_(columns * in) {
    // As many positions as registers hold, unless fewer leave less to be computed twice.
    const auto twice = [&](std::int64_t p) { return (width + p - 1) / p * p - width; };
    const bool two = block_ > Wide::lanes;
    positions_ = two ? kDouble : kSingle;
    while (positions_ > kLeastWidth && (width < positions_ || twice(positions_) > twice(positions_ / 2) + width / 8)) positions_ /= 2;
    if (two)
      tile_ = positions_ == kDouble ? tile_of<Wide, kDouble, 2>(step) : tile_of<Wide, 4, 2>(step);
    else
      tile_ = block_ == Wide::lanes ? single<Wide>(step) : single<Half>(step);
  }

  std::int64_t weights() const { return out_ * rows_ * length_; }

  // x: the first tap of the first position; `row`: from one row of taps to the next. `done` hears of every row of a block of
  // channels: (where it begins, its positions, its first channel).
  template <typename Done>
  FEDKERN_INLINE void run(const float* x, std::int64_t row, const ConvSteps& steps, std::int64_t height, std::int64_t width, const float* weight, float* y,
                          Done&& done) const {
    for (std::int64_t c = 0; c < out_; c += block_, weight += rows_ * length_ * block_)
      for (std::int64_t i = 0; i < height; ++i) {
        float* const to = y + i * steps.y_row + c;
        // The last tile may overlap the one before.
        for (std::int64_t j = 0; j < width; j += positions_) {
          const std::int64_t at = std::min(j, width - positions_);
          tile_(x + i * steps.x_row + at * steps.x_step, row, steps.x_step, rows_, length_, weight, to + at * steps.y_step, steps.y_step);
        }
        done(to, width, c);
      }
  }

 private:
#if defined(FEDKERN_ISA_avx512)
  static constexpr std::int64_t kDouble = 8, kSingle = 16;
#else
  static constexpr std::int64_t kDouble = 4, kSingle = 8;
#endif
  template <typename V>
  ConvTile single(std::int64_t step) const {
    if constexpr (kSingle == 16)
      if (positions_ == 16) return tile_of<V, 16, 1>(step);
    return positions_ == 8 ? tile_of<V, 8, 1>(step) : tile_of<V, 4, 1>(step);
  }

  std::int64_t out_, block_, positions_;
  int rows_;
  std::int64_t length_;
  ConvTile tile_;
};

template <typename V, int K, int R, int N>
void add_taps(const float* x, std::int64_t x_row, const float* d, std::int64_t d_row, const ConvShape& s, float* to, bool first) {
  const ConvShape result = s.result();
  const std::int64_t taps = s.kernel * s.in;  // of a row
  for (std::int64_t c = 0; c < s.out; c += N * V::lanes)
    for (std::int64_t r = 0; r < s.kernel; r += R)
      for (std::int64_t k = 0; k < taps; k += K)
        outer_tile<V, K, R, N>({x + r * x_row + k, s.stride * x_row, s.stride * s.in}, x_row, {d + c, d_row, s.out}, result.height, result.width,
                               to + (r * taps + k) * s.out + c, s.out, taps * s.out, first);
}

// Adds a sample's gradient of the weights, [taps][in][out]; the `first` sets it. x and d: at the first position that taps reach, and
// at the first position of the gradient.
inline void add_taps(const float* x, std::int64_t x_row, const float* d, std::int64_t d_row, const ConvShape& s, float* to, bool first) {
  const auto pick = [&](auto point, auto one, auto three, auto many) {
    (s.kernel == 1 ? point : s.in == 1 ? one : s.in == 3 ? three : many)(x, x_row, d, d_row, s, to, first);
  };
#if defined(FEDKERN_ISA_avx512)
  if (s.out % 32 == 0)
    pick(add_taps<Wide, 8, 1, 2>, add_taps<Wide, 3, 3, 2>, add_taps<Wide, 9, 1, 2>, add_taps<Wide, 12, 1, 2>);
  else if (s.out % 16 == 0)
    pick(add_taps<Wide, 8, 1, 1>, add_taps<Wide, 3, 3, 1>, add_taps<Wide, 9, 3, 1>, add_taps<Wide, 24, 1, 1>);
  else
    pick(add_taps<Half, 8, 1, 1>, add_taps<Half, 3, 3, 1>, add_taps<Half, 9, 3, 1>, add_taps<Half, 24, 1, 1>);
#else
  if (s.out % 16 == 0)
    pick(add_taps<Wide, 4, 1, 2>, add_taps<Wide, 3, 1, 2>, add_taps<Wide, 3, 1, 2>, add_taps<Wide, 6, 1, 2>);
  else
    pick(add_taps<Wide, 8, 1, 1>, add_taps<Wide, 3, 3, 1>, add_taps<Wide, 9, 1, 1>, add_taps<Wide, 12, 1, 1>);
#endif
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
