// Convolutions of several branches with few channels each: a direct algorithm whose lanes run over positions.
//
// A sample's input is first laid into a scratch map with its zero border, taken apart by the stride's phases, so that
// every tap of the kernel is one offset and a vector of outputs needs one load per tap, whatever the width of the map. A
// block of output channels times kVectors vectors of positions stays in registers over all input channels and taps.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fedkern/fuse.h"
#include "fedkern/parallel.h"
#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

inline constexpr int kVectors = 2;
#if defined(FEDKERN_ISA_avx512)
inline constexpr std::int64_t kConvBlock = 14;  // 28 of 32 registers
#else
inline constexpr std::int64_t kConvBlock = 6;  // 12 of 16
#endif
inline constexpr std::int64_t kLanes = Vec<float>::lanes, kTilePositions = kVectors * kLanes;
// Positions that are computed before their results are finished and written: a multiple of every level's tile.
inline constexpr std::int64_t kBand = kFuseConvColumns;
// Weights that are applied to a whole band before the next ones are read: 8 KB.
inline constexpr std::int64_t kConvWeights = 2048;

struct ConvPlan {
  std::int64_t phases_y, phases_x, rows, columns;  // of the scratch map, per phase
  std::int64_t plane, taps;
  bool by_row;                 // output rows are whole vectors: no position of the border is computed
  std::int64_t band_rows, pitch;  // rows of a band, and positions from one to the next among its results

  explicit ConvPlan(const FuseConv& a) {
    const std::int64_t reach_y = (a.kernel_height - 1) * a.dilation, reach_x = (a.kernel_width - 1) * a.dilation;
    phases_y = std::min(a.stride, reach_y + 1);
    phases_x = std::min(a.stride, reach_x + 1);
    rows = a.out_height + reach_y / a.stride;
    columns = a.out_width + reach_x / a.stride;
    plane = phases_y * phases_x * rows * columns;
    taps = a.kernel_height * a.kernel_width;
    by_row = a.out_width % kLanes == 0;
    pitch = by_row ? a.out_width : columns;
    band_rows = std::clamp<std::int64_t>(kBand / pitch, 1, a.out_height);
  }
  // Positions of a band, whole tiles of them.
  std::int64_t positions(std::int64_t count) const { return (count * pitch + kTilePositions - 1) / kTilePositions * kTilePositions; }
  // What the last tiles read past the map.
  std::int64_t scratch(std::int64_t channels) const { return channels * plane + kBand + kTilePositions + columns; }
};

// The scratch map of one sample of one branch.
inline void lay_out(const FuseConv& a, const ConvPlan& plan, const float* x, float* scratch) {
  for (std::int64_t c = 0; c < a.in_channels; ++c, x += a.height * a.width)
    for (std::int64_t py = 0; py < plan.phases_y; ++py)
      for (std::int64_t px = 0; px < plan.phases_x; ++px)
        for (std::int64_t row = 0; row < plan.rows; ++row, scratch += plan.columns) {
          const std::int64_t from = row * a.stride + py - a.pad_height;
          if (from < 0 || from >= a.height) {
            std::fill_n(scratch, plan.columns, 0.0f);
            continue;
          }
          const float* line = x + from * a.width;
          // Columns [begin, end) lie within the input.
          const std::int64_t first = px - a.pad_width;
          const std::int64_t begin = first >= 0 ? 0 : std::min(plan.columns, (-first + a.stride - 1) / a.stride);
          const std::int64_t end = std::clamp<std::int64_t>((a.width - first + a.stride - 1) / a.stride, begin, plan.columns);
          std::fill(scratch, scratch + begin, 0.0f);
          if (a.stride == 1)
            std::memcpy(scratch + begin, line + first + begin, (end - begin) * sizeof(float));
          else
            for (std::int64_t i = begin; i < end; ++i) scratch[i] = line[first + i * a.stride];
          std::fill(scratch + end, scratch + plan.columns, 0.0f);
        }
}

// `block` output channels at kVectors vectors of positions: the sum over input channels and taps is added to `start`, or
// where that is null to `result`.
template <int block>
void conv_tile(const float* const* at, std::int64_t channels, std::int64_t plane, const std::int64_t* tap, std::int64_t taps,
               const float* weight, const float* start, float* result, std::int64_t pitch) {
  using V = Vec<float>;
  V sum[block][kVectors];
  for (int c = 0; c < block; ++c)
    for (int v = 0; v < kVectors; ++v) sum[c][v] = start ? V::set(start[c]) : V::load(result + c * pitch + v * kLanes);
  for (std::int64_t i = 0; i < channels; ++i)
    for (std::int64_t t = 0; t < taps; ++t, weight += block) {
      const std::int64_t offset = i * plane + tap[t];
      V x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = V::load(at[v] + offset);
#pragma GCC unroll 16
      for (int c = 0; c < block; ++c) {
        const V w = V::set(weight[c]);
        for (int v = 0; v < kVectors; ++v) sum[c][v] = fma(w, x[v], sum[c][v]);
      }
    }
  for (int c = 0; c < block; ++c)
    for (int v = 0; v < kVectors; ++v) sum[c][v].store(result + c * pitch + v * kLanes);
}

using ConvTile = void (*)(const float* const*, std::int64_t, std::int64_t, const std::int64_t*, std::int64_t, const float*,
                          const float*, float*, std::int64_t);

template <std::size_t... sizes>
ConvTile pick_tile(std::int64_t block, std::index_sequence<sizes...>) {
  static constexpr ConvTile tiles[] = {conv_tile<static_cast<int>(sizes) + 1>...};
  return tiles[block - 1];
}

// n results of one channel, one output row: sum, ReLU, out.
inline void finish_row(const float* result, const float* other, std::int64_t n, bool relu, float* out) {
  using V = Vec<float>;
  const V zero = V::set(0);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const std::int64_t m = std::min(kLanes, n - i);
    V y = V::load(result + i);  // the tile is whole
    if (other) y = y + (m == kLanes ? V::load(other + i) : V::load_partial(other + i, m));
    if (relu) y = max(zero, y);
    if (m == kLanes)
      y.store(out + i);
    else
      y.store_partial(out + i, m);
  }
}

inline void convolve_sample(const FuseConv& a, const ConvPlan& plan, const std::int64_t* tap, ConvTile tile, const float* scratch,
                            std::int64_t b, std::int64_t branch) {
  alignas(64) float result[kConvBlock * (kBand + kTilePositions)];
  constexpr std::int64_t pitch = kBand + kTilePositions;
  const std::int64_t blocks = (a.channels + a.block - 1) / a.block, size = a.out_height * a.out_width;
  const std::int64_t weights = a.in_channels * plan.taps * a.block;
  // So many input channels at once that their weights, and the band that they are applied to, stay in L1.
  const std::int64_t chunk = std::max<std::int64_t>(1, kConvWeights / (plan.taps * a.block));
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = block * a.block, count = std::min(a.block, a.channels - first);
    const float* weight = a.weight + (branch * blocks + block) * weights;
    float start[kConvBlock] = {};
    if (a.bias.present) std::copy_n(a.bias.data + branch * a.channels + first, count, start);
    for (std::int64_t y = 0; y < a.out_height; y += plan.band_rows) {
      const std::int64_t rows = std::min(plan.band_rows, a.out_height - y);
      for (std::int64_t i = 0; i < a.in_channels; i += chunk) {
        const float* from = scratch + i * plan.plane;
        for (std::int64_t p = 0; p < plan.positions(rows); p += kTilePositions) {
          const float* at[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            const std::int64_t q = p + v * kLanes;
            // Vectors past the last row are computed from what lies behind it, and dropped.
            at[v] = from + (plan.by_row ? std::min(y + q / plan.pitch, a.out_height - 1) * plan.columns + q % plan.pitch
                                        : y * plan.columns + q);
          }
          tile(at, std::min(chunk, a.in_channels - i), plan.plane, tap, plan.taps, weight + i * plan.taps * a.block,
               i ? nullptr : start, result + p, pitch);
        }
      }
      for (std::int64_t c = 0; c < count; ++c)
        for (std::int64_t row = 0; row < rows; ++row) {
          const std::int64_t to = (first + c) * size + (y + row) * a.out_width;
          const float* other = a.other.present ? a.other.data + b * a.other_batch + branch * a.other_branch + to : nullptr;
          finish_row(result + c * pitch + row * plan.pitch, other, a.out_width, a.relu, a.out + b * a.out_batch + branch * a.out_branch + to);
        }
    }
  }
}

inline void convolve(const FuseConv& a) {
  if (!a.batch || !a.channels || !a.out_height || !a.out_width) return;
  const ConvPlan plan(a);
  const bool shared = a.x_branch == 0;
  std::int64_t* tap = static_cast<std::int64_t*>(std::malloc(plan.taps * sizeof(std::int64_t)));
  if (!tap) std::abort();
  for (std::int64_t ky = 0, t = 0; ky < a.kernel_height; ++ky)
    for (std::int64_t kx = 0; kx < a.kernel_width; ++kx, ++t) {
      const std::int64_t dy = ky * a.dilation, dx = kx * a.dilation;
      tap[t] = ((dy % a.stride * plan.phases_x + dx % a.stride) * plan.rows + dy / a.stride) * plan.columns + dx / a.stride;
    }
  const ConvTile tile = pick_tile(a.block, std::make_index_sequence<kConvBlock>{});
  // A sample's shared map is laid out once for all branches.
  const std::int64_t units = shared ? a.batch : a.batch * a.branches, whole = plan.scratch(a.in_channels);
  auto work = [&](std::int64_t begin, std::int64_t end) {
    float* scratch = static_cast<float*>(std::malloc(whole * sizeof(float)));
    if (!scratch) std::abort();
    std::fill(scratch + a.in_channels * plan.plane, scratch + whole, 0.0f);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = shared ? unit : unit / a.branches, first = shared ? 0 : unit % a.branches;
      lay_out(a, plan, a.x + b * a.x_batch + first * a.x_branch, scratch);
      for (std::int64_t branch = first; branch < (shared ? a.branches : first + 1); ++branch)
        convolve_sample(a, plan, tap, tile, scratch, b, branch);
    }
    std::free(scratch);
  };
  const double operations = 2.0 * a.batch * a.branches * a.channels * a.out_height * a.out_width * a.in_channels * plan.taps;
  parallel_for(units, 1, a.threads, operations * 1e-11, work);
  std::free(tap);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
