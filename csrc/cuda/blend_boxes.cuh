// erase_boxes, keep_boxes: a block takes a stretch of one sample's pixels, with the sample's boxes in shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fedkern/blend_cuda.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kBoxThreads = 256;
constexpr int kBoxesAtOnce = 64;
constexpr int kChannelsAtOnce = 8, kChannelsInFlight = 4;  // of a block, of a thread

// Elements [left, right) of the rows [top, bottom).
struct Covered {
  int left, right, top, bottom;
};

// First pixel j in [0, limit] whose centre j + 1/2 is at or beyond `edge`.
__device__ __forceinline__ int first_pixel(double edge, int limit) {
  const double pixel = ceil(edge - 0.5);
  if (!(pixel > 0)) return 0;
  return pixel >= static_cast<double>(limit) ? limit : static_cast<int>(pixel);
}

__device__ __forceinline__ Covered covered_by(const double* box, int height, int width, int elements) {
  const double x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  if (x1 != x1 || y1 != y1 || x2 != x2 || y2 != y2) return {0, 0, 0, 0};
  return {first_pixel(x1, width) * elements, first_pixel(x2, width) * elements, first_pixel(y1, height), first_pixel(y2, height)};
}

// A bit for each of the N elements from x of row y on that one of `count` boxes covers.
template <int N>
__device__ __forceinline__ unsigned inside(const Covered* boxes, int count, int x, int y, int width) {
  unsigned bits = 0;
  for (int done = 0; done < N; x = 0, ++y) {
    const int length = std::min(N - done, width - x);
    for (int k = 0; k < count; ++k) {
      const Covered box = boxes[k];
      const int left = std::max(box.left - x, 0), right = std::min(box.right - x, length);
      if (y >= box.top && y < box.bottom && left < right) bits |= ((1u << right) - (1u << left)) << done;
    }
    done += length;
  }
  return bits;
}

// Elements of a sample are walked in units of N that lie together in memory. Interleaved: units of (pixel, channel) with
// channels innermost, C of them to a pixel; else units of pixels, and `groups` blocks share the channels. N > 1 needs dense
// memory.
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kBoxThreads) boxes_kernel(FillBoxes a, std::int64_t units, std::int64_t stretches, int groups) {
  __shared__ Covered boxes[kBoxesAtOnce];
  const int channels = static_cast<int>(a.channels), elements = Interleaved ? channels : 1;
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
  for (std::int64_t work = blockIdx.x; work < a.batch * stretches * groups; work += gridDim.x) {
    const std::int64_t stretch = work / groups, b = stretch / stretches, unit = stretch % stretches * kBoxThreads + threadIdx.x;
    const std::int64_t first = unit * N, y = first / (width * elements), x = first % (width * elements);
    const T* const fill = static_cast<const T*>(a.fill) + b * a.fill_stride;
    const bool mine = unit < units;
    unsigned replaced = a.keep ? ~0u : 0;
    for (std::int64_t begin = 0; begin < a.boxes; begin += kBoxesAtOnce) {
      const int count = static_cast<int>(a.boxes - begin < kBoxesAtOnce ? a.boxes - begin : kBoxesAtOnce);
      __syncthreads();
      if (threadIdx.x < count) boxes[threadIdx.x] = covered_by(a.box + (b * a.boxes + begin + threadIdx.x) * 4, height, width, elements);
      __syncthreads();
      if (!mine) continue;
      const unsigned bits = inside<N>(boxes, count, static_cast<int>(x), static_cast<int>(y), width * elements);
      replaced = a.keep ? replaced & ~bits : replaced | bits;
    }
    if (!mine) continue;
    constexpr unsigned kAll = (1u << N) - 1;
    const bool seen = (replaced & kAll) != kAll;  // what is replaced as a whole is not read
    if constexpr (Interleaved) {
      Pack<T, N> pack{};
      if (seen) pack = load_pack<T, N>(a.images, b * a.stride[0] + first);
      int channel = static_cast<int>(x) % channels;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (replaced >> i & 1) pack.lane[i] = fill[channel];
        if (++channel == channels) channel = 0;
      }
      store_pack<T, N>(a.out, b * a.out_stride[0] + first, pack);
    } else {
      const std::int64_t from = b * a.stride[0] + (N > 1 ? first : y * a.stride[2] + x * a.stride[3]);
      const std::int64_t to = b * a.out_stride[0] + (N > 1 ? first : y * a.out_stride[2] + x * a.out_stride[3]);
      const int begin = static_cast<int>(work % groups) * kChannelsAtOnce, end = std::min(begin + kChannelsAtOnce, channels);
      for (int c = begin; c < end; c += kChannelsInFlight) {
        Pack<T, N> pack[kChannelsInFlight] = {};
        T value[kChannelsInFlight];
#pragma unroll
        for (int k = 0; k < kChannelsInFlight; ++k) {
          const int channel = std::min(c + k, end - 1);
          if (seen) pack[k] = load_pack<T, N>(a.images, from + channel * a.stride[1]);
          value[k] = fill[channel];
        }
#pragma unroll
        for (int k = 0; k < kChannelsInFlight; ++k) {
#pragma unroll
          for (int i = 0; i < N; ++i)
            if (replaced >> i & 1) pack[k].lane[i] = value[k];
          if (c + k < end) store_pack<T, N>(a.out, to + (c + k) * a.out_stride[1], pack[k]);
        }
      }
    }
  }
}

template <typename T, int N, bool Interleaved>
void launch_boxes(const FillBoxes& a, const Queue& queue) {
  const std::int64_t units = a.height * a.width * (Interleaved ? a.channels : 1) / N, stretches = (units + kBoxThreads - 1) / kBoxThreads;
  const int groups = Interleaved ? 1 : static_cast<int>((a.channels + kChannelsAtOnce - 1) / kChannelsAtOnce);
  launch("fill_boxes", boxes_kernel<T, N, Interleaved>, grid(a.batch * stretches * groups, 1, queue), kBoxThreads, queue, a, units, stretches, groups);
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
  const bool interleaved = a.channels > 1 && a.width * a.channels <= INT32_MAX && a.stride[1] == 1 && a.out_stride[1] == 1 &&
                           rows_follow(a.stride, a.channels) && rows_follow(a.out_stride, a.channels);
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
