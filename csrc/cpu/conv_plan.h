// What conv's passes have in common: how a batch is divided, its maps with a border of zeros, and weights in the kernels' order.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "conv_lanes.h"
#include "fedkern/conv.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Channels that a kernel makes at a time: two vectors where they come in thirty-twos (AVX2: sixteens), else one.
inline std::int64_t block_of(std::int64_t channels) {
  return channels % (2 * Wide::lanes) == 0 ? 2 * Wide::lanes : channels % Wide::lanes == 0 ? Wide::lanes : Half::lanes;
}

// Channels of a direct convolution's result: those of images are few, and computed as eight.
inline std::int64_t rounded_up(std::int64_t channels) { return (channels + 7) / 8 * 8; }

// Work of a pass over so many numbers in memory, as parallel_for wants it.
inline double seconds(std::int64_t numbers) { return 3e-10 * static_cast<double>(numbers); }

// Rows [begin, end) of maps, begin even.
struct Band {
  std::int64_t begin, end, width;
  std::int64_t tiles() const { return (end - begin + 1) / 2 * ((width + 1) / 2); }  // of 2 x 2
  std::int64_t positions() const { return (end - begin) * width; }
};

struct ConvPlan {
  // Tiles that a matrix product should have, and may have, to be worth its weights and stay in L2.
  static constexpr std::int64_t kFewTiles = 64, kManyTiles = 128;

  ConvShape shape, result;
  bool winograd;
  std::int64_t group;            // samples that kernels take at a time
  std::int64_t rows;             // of those samples, at a time
  std::int64_t tiles;            // of such a band of all of them
  std::int64_t piece, pieces;    // samples whose sums are one partial sum; how many such
  std::int64_t in_row, out_row;  // floats of a row of a map with its border
  std::int64_t in_map, out_map;  // of such a map, the border below and one row that tiles of odd heights read

  explicit ConvPlan(const ConvShape& s) : shape(s), result(s.result()) {
    winograd = s.kernel == 3 && s.stride == 1 && s.in % 16 == 0 && s.out % 16 == 0;
    // Few, since their sums are added one after another; a power of two, so that threads share them evenly, whose number must not
    // matter.
    pieces = s.batch < 4 ? 1 : 2;
    while (pieces < 16 && s.batch >= 16 * pieces) pieces *= 2;
    piece = (s.batch + pieces - 1) / pieces, pieces = (s.batch + piece - 1) / piece;
    const std::int64_t across = (s.width + 1) / 2, whole = (s.height + 1) / 2 * across;
    group = winograd ? std::clamp<std::int64_t>(kFewTiles / whole, 1, piece) : 1;
    rows = winograd && whole > kManyTiles ? 2 * std::max<std::int64_t>(1, kManyTiles / across) : s.height;
    tiles = group * Band{0, rows, s.width}.tiles();
    const auto bordered = [](std::int64_t size) { return size + 2 + size % 2; };
    in_row = bordered(s.width) * s.in, in_map = bordered(s.height) * in_row;
    if (s.kernel == 1) in_row = s.width * s.in, in_map = 0;  // read where it is
    out_row = bordered(result.width) * s.out, out_map = bordered(result.height) * out_row;
  }
  std::int64_t in_floats() const { return shape.height * shape.width * shape.in; }  // of a sample
  std::int64_t out_floats() const { return result.height * result.width * shape.out; }
  // body(band) for the bands of a sample.
  template <typename Body>
  FEDKERN_INLINE void bands(Body&& body) const {
    for (std::int64_t i = 0; i < shape.height; i += rows) body(Band{i, std::min(i + rows, shape.height), shape.width});
  }
  std::int64_t weights() const { return shape.taps() * shape.in * shape.out; }
};

// Copies a sample into the border. Returns where kernels read it: a kernel of one tap needs no border.
inline const float* lay_out(const float* x, const ConvPlan& p, float* to) {
  const ConvShape& s = p.shape;
  if (s.kernel == 1) return x;
  for (std::int64_t y = 0; y < s.height; ++y) std::memcpy(to + (y + 1) * p.in_row + s.in, x + y * s.width * s.in, s.width * s.in * sizeof(float));
  return to;
}

// Weights as kernels read them: blocks of output channels, in each the taps, in each the input channels: [out / block][taps][in][block].
inline void pack(const ConvNorm& a, float* to) {
  const ConvShape& s = a.shape;
  const std::int64_t block = block_of(s.out);
  for (std::int64_t first = 0; first < s.out; first += block)
    for (int tap = 0; tap < s.taps(); ++tap)
      for (std::int64_t i = 0; i < s.in; ++i, to += block) {
        const float* from = a.weight + first * a.weight_out + i * a.weight_in + tap * a.weight_tap;
        for (std::int64_t c = 0; c < block; ++c) to[c] = from[c * a.weight_out];
      }
}

// Weights of a convolution that leads back, from `out` channels to `in`: those of the taps of the rows and columns `down` and
// `across` in their order, [in / block][taps][out][block]. Returns where they end.
inline float* pack_back(const ConvNorm& a, std::initializer_list<int> down, std::initializer_list<int> across, float* to) {
  const ConvShape& s = a.shape;
  const std::int64_t channels = rounded_up(s.in), block = block_of(channels);
  for (std::int64_t first = 0; first < channels; first += block)
    for (const int y : down)
      for (const int x : across)
        for (std::int64_t o = 0; o < s.out; ++o, to += block) {
          const float* from = a.weight + o * a.weight_out + first * a.weight_in + (s.kernel * y + x) * a.weight_tap;
          for (std::int64_t c = 0; c < block; ++c) to[c] = first + c < s.in ? from[c * a.weight_in] : 0.0f;
        }
  return to;
}

// All of them. At stride 1 taps are turned round. At stride 2 a row of x has one row of taps where it is even and two where it
// is odd, and so have columns: four convolutions, one after another, of even and odd columns of even rows, then of odd ones.
inline void pack_back(const ConvNorm& a, float* to) {
  if (a.shape.kernel == 1) {
    pack_back(a, {0}, {0}, to);
    return;
  }
  if (a.shape.stride == 1) {
    pack_back(a, {2, 1, 0}, {2, 1, 0}, to);
    return;
  }
  to = pack_back(a, {1}, {1}, to), to = pack_back(a, {1}, {2, 0}, to);
  to = pack_back(a, {2, 0}, {1}, to), pack_back(a, {2, 0}, {2, 0}, to);
}

// A gradient [taps][in][out] -> at the weight's strides.
inline void unpack(const float* from, const ConvNorm& a, float* to) {
  const ConvShape& s = a.shape;
  constexpr std::int64_t kSquare = 16;  // rows and columns that stay in L1
  for (std::int64_t first = 0; first < s.in; first += kSquare)
    for (int tap = 0; tap < s.taps(); ++tap)
      for (std::int64_t o = 0; o < s.out; ++o)
        for (std::int64_t i = first; i < std::min(first + kSquare, s.in); ++i)
          to[o * a.weight_out + i * a.weight_in + tap * a.weight_tap] = from[(tap * s.in + i) * s.out + o];
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
