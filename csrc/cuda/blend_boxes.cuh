// erase_boxes, keep_boxes: a block takes a stretch of one sample's pixels, with the sample's boxes in shared memory.
#pragma once

#include <type_traits>

#include "fedkern/blend_cuda.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kBoxThreads = 256;
constexpr int kBoxesAtOnce = 64;

struct PixelRange {
  int left, right, top, bottom;
};

// First pixel j in [0, limit] whose centre j + 1/2 is at or beyond `edge`.
__device__ __forceinline__ int first_pixel(double edge, int limit) {
  const double pixel = ceil(edge - 0.5);
  if (!(pixel > 0)) return 0;
  return pixel >= static_cast<double>(limit) ? limit : static_cast<int>(pixel);
}

__device__ __forceinline__ PixelRange pixels_of(const double* box, int height, int width) {
  const double x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  if (x1 != x1 || y1 != y1 || x2 != x2 || y2 != y2) return {0, 0, 0, 0};
  return {first_pixel(x1, width), first_pixel(x2, width), first_pixel(y1, height), first_pixel(y2, height)};
}

// Elements of a sample are walked in units of N that lie together in memory. Interleaved: units of (pixel, channel) with
// channels innermost, C of them to a pixel; else units of pixels, the channels one after another. N > 1 needs dense memory.
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kBoxThreads) boxes_kernel(FillBoxes a, std::int64_t units, std::int64_t stretches) {
  __shared__ PixelRange ranges[kBoxesAtOnce];
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
  const T* const fill = static_cast<const T*>(a.fill);
  for (std::int64_t work = blockIdx.x; work < a.batch * stretches; work += gridDim.x) {
    const std::int64_t b = work / stretches, unit = work % stretches * kBoxThreads + threadIdx.x;
    const std::int64_t first = unit * N, first_of_pixel = Interleaved ? first / a.channels : first;
    const bool mine = unit < units;
    unsigned inside = 0;  // one bit per element of the unit
    for (std::int64_t begin = 0; begin < a.boxes; begin += kBoxesAtOnce) {
      const int count = static_cast<int>(a.boxes - begin < kBoxesAtOnce ? a.boxes - begin : kBoxesAtOnce);
      __syncthreads();
      if (threadIdx.x < count) ranges[threadIdx.x] = pixels_of(a.box + (b * a.boxes + begin + threadIdx.x) * 4, height, width);
      __syncthreads();
      if (!mine) continue;
      std::int64_t pixel = first_of_pixel, channel = Interleaved ? first % a.channels : 0;
      int y = static_cast<int>(pixel / width), x = static_cast<int>(pixel % width);
      unsigned hit = 0, bit = 1;
#pragma unroll
      for (int i = 0; i < N; ++i, bit <<= 1) {
        if (i == 0 || !Interleaved || channel == 0) {
          hit = 0;
          for (int k = 0; k < count; ++k) {
            const PixelRange r = ranges[k];
            hit |= x >= r.left && x < r.right && y >= r.top && y < r.bottom;
          }
        }
        if (hit) inside |= bit;
        if (!Interleaved || ++channel == a.channels) {
          channel = 0;
          if (++x == width) x = 0, ++y;
        }
      }
    }
    if (!mine) continue;
    const unsigned replaced = a.keep ? ~inside : inside;
    if constexpr (Interleaved) {
      auto pack = load_pack<T, N>(a.images, b * a.stride[0] + first);
      std::int64_t channel = first % a.channels;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (replaced >> i & 1) pack.lane[i] = fill[b * a.fill_stride + channel];
        if (++channel == a.channels) channel = 0;
      }
      store_pack<T, N>(a.out, b * a.out_stride[0] + first, pack);
    } else {
      const std::int64_t y = first / width, x = first % width;
      std::int64_t from = b * a.stride[0] + (N > 1 ? first : y * a.stride[2] + x * a.stride[3]);
      std::int64_t to = b * a.out_stride[0] + (N > 1 ? first : y * a.out_stride[2] + x * a.out_stride[3]);
      for (std::int64_t c = 0; c < a.channels; ++c, from += a.stride[1], to += a.out_stride[1]) {
        auto pack = load_pack<T, N>(a.images, from);
        const T value = fill[b * a.fill_stride + c];
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (replaced >> i & 1) pack.lane[i] = value;
        store_pack<T, N>(a.out, to, pack);
      }
    }
  }
}

template <typename T, int N, bool Interleaved>
void launch_boxes(const FillBoxes& a, const Queue& queue) {
  const std::int64_t units = a.height * a.width * (Interleaved ? a.channels : 1) / N, stretches = (units + kBoxThreads - 1) / kBoxThreads;
  launch("fill_boxes", boxes_kernel<T, N, Interleaved>, grid(a.batch * stretches, 1, queue), kBoxThreads, queue, a, units, stretches);
}

template <typename T>
void launch_boxes(const FillBoxes& a, const Queue& queue) {
  constexpr int N = kLanes<T>;
  const auto wide = [&](std::int64_t dense, std::initializer_list<std::int64_t> strides) {
    bool fits = dense % N == 0 && aligned16(a.images) && aligned16(a.out);
    for (std::int64_t stride : strides) fits = fits && stride % N == 0;
    return fits;
  };
  // Axes of one element have no stride to speak of.
  const auto rows_follow = [&](const std::int64_t* s, std::int64_t step) {
    return (a.width == 1 || s[3] == step) && (a.height == 1 || s[2] == step * a.width);
  };
  const bool interleaved = a.channels > 1 && a.stride[1] == 1 && a.out_stride[1] == 1 && rows_follow(a.stride, a.channels) &&
                           rows_follow(a.out_stride, a.channels);
  const std::int64_t pixels = a.height * a.width;
  if (interleaved) {
    if (wide(pixels * a.channels, {a.stride[0], a.out_stride[0]})) return launch_boxes<T, N, true>(a, queue);
    return launch_boxes<T, 1, true>(a, queue);
  }
  if (rows_follow(a.stride, 1) && rows_follow(a.out_stride, 1) && wide(pixels, {a.stride[0], a.stride[1], a.out_stride[0], a.out_stride[1]}))
    return launch_boxes<T, N, false>(a, queue);
  launch_boxes<T, 1, false>(a, queue);
}

}  // namespace
}  // namespace fedkern::cuda
