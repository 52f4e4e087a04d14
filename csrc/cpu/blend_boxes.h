// erase_boxes, keep_boxes: which pixels lie in a box, and the copy that replaces them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fedkern/blend.h"
#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// First pixel j in [0, limit] whose centre j + 1/2 is at or beyond `edge`.
inline std::int64_t first_pixel(double edge, std::int64_t limit) {
  const double pixel = std::ceil(edge - 0.5);
  if (!(pixel > 0)) return 0;
  return pixel >= static_cast<double>(limit) ? limit : static_cast<std::int64_t>(pixel);
}

void box_mask(const BoxMask& a) {
  if (a.height * a.width == 0) return;  // torch gives no memory to a mask without pixels
  auto samples = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      std::uint8_t* mask = a.mask + b * a.height * a.width;
      std::memset(mask, 0, static_cast<std::size_t>(a.height * a.width));
      for (std::int64_t k = 0; k < a.boxes; ++k) {
        const double* box = a.box + (b * a.boxes + k) * 4;
        const std::int64_t left = first_pixel(box[0], a.width), right = first_pixel(box[2], a.width);
        const std::int64_t top = first_pixel(box[1], a.height), bottom = first_pixel(box[3], a.height);
        for (std::int64_t y = top; y < bottom && left < right; ++y)
          std::memset(mask + y * a.width + left, 1, static_cast<std::size_t>(right - left));
      }
    }
  };
  const double estimate = static_cast<double>(a.batch * a.height * a.width) * 2e-11 + static_cast<double>(a.batch * a.boxes) * 1e-8;
  parallel_for(a.batch, 1, a.threads, estimate, samples);
}

// Calls fill(begin, end) for every run of pixels that are to be replaced.
template <typename Fill>
inline void for_runs(const std::uint8_t* mask, std::int64_t pixels, std::uint8_t replaced, Fill&& fill) {
  for (std::int64_t begin = 0; begin < pixels;) {
    const void* first = std::memchr(mask + begin, replaced, static_cast<std::size_t>(pixels - begin));
    if (!first) return;
    begin = static_cast<const std::uint8_t*>(first) - mask;
    const void* last = std::memchr(mask + begin, 1 - replaced, static_cast<std::size_t>(pixels - begin));
    const std::int64_t end = last ? static_cast<const std::uint8_t*>(last) - mask : pixels;
    fill(begin, end);
    begin = end;
  }
}

template <typename T>
void box_fill(const BoxFill& a) {
  if (a.pixels == 0) return;
  // One unit is what lies together in memory, a channel's plane or a channels-last sample: copied, then filled in cache.
  auto planes = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / a.channels, c = unit % a.channels;
      const T* x = static_cast<const T*>(a.images) + b * a.batch_stride + c * a.channel_stride;
      T* out = static_cast<T*>(a.out) + b * a.out_batch_stride + c * a.out_channel_stride;
      const T fill = static_cast<const T*>(a.fill)[b * a.fill_stride + c];
      if (a.pixel_stride == 1 && a.out_pixel_stride == 1)
        std::memcpy(out, x, static_cast<std::size_t>(a.pixels) * sizeof(T));
      else
        for (std::int64_t i = 0; i < a.pixels; ++i) out[i * a.out_pixel_stride] = x[i * a.pixel_stride];
      for_runs(a.mask + b * a.pixels, a.pixels, a.replaced, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) out[i * a.out_pixel_stride] = fill;
      });
    }
  };
  auto interleaved = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const T* x = static_cast<const T*>(a.images) + b * a.batch_stride;
      T* out = static_cast<T*>(a.out) + b * a.out_batch_stride;
      const T* fill = static_cast<const T*>(a.fill) + b * a.fill_stride;
      if (a.pixel_stride == a.channels && a.out_pixel_stride == a.channels)
        std::memcpy(out, x, static_cast<std::size_t>(a.pixels * a.channels) * sizeof(T));
      else
        for (std::int64_t i = 0; i < a.pixels; ++i)
          for (std::int64_t c = 0; c < a.channels; ++c) out[i * a.out_pixel_stride + c] = x[i * a.pixel_stride + c];
      for_runs(a.mask + b * a.pixels, a.pixels, a.replaced, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i)
          for (std::int64_t c = 0; c < a.channels; ++c) out[i * a.out_pixel_stride + c] = fill[c];
      });
    }
  };
  const double estimate = static_cast<double>(a.batch * a.channels * a.pixels) * 0.3e-9;
  if (a.channel_stride == 1 && a.out_channel_stride == 1 && a.channels > 1)
    parallel_for(a.batch, 1, a.threads, estimate, interleaved);
  else
    parallel_for(a.batch * a.channels, 1, a.threads, estimate, planes);
}

void box_fill_any(const BoxFill& a) {
  switch (a.item) {
    case 1: return box_fill<std::uint8_t>(a);
    case 2: return box_fill<std::uint16_t>(a);
    case 4: return box_fill<std::uint32_t>(a);
    default: return box_fill<std::uint64_t>(a);
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
