// blend: out[b] = alpha[b] * foreground[b] + (1 - alpha[b]) * background[index[b]]
//
// Samples are dense in memory, in any order of axes that both inputs share, so a kernel sees rows of `size` elements.
// fp32, bf16 and f16 are computed in fp32 and rounded once, fp64 in fp64; sums over several samples are taken in fp64 in
// ascending order of the sample, whatever the number of threads.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

// [rows, size] elements; the stride between rows is in elements.
struct Rows {
  void* data;
  std::int64_t stride;
  bool present = true;
};

// One weight per sample: each[b * stride], or `value` for all where `each` is absent.
struct Alpha {
  Optional<const double> each;
  std::int64_t stride;
  double value;
};

struct BlendForward {
  DType dtype;
  std::int64_t rows, size;     // B, and elements of a sample
  Rows foreground, background, out;
  Optional<const std::int64_t> index;  // [rows] into background; absent for the identity
  Alpha alpha;
  int threads;
  bool stream = false;  // write past the caches: for results that do not fit there
};

// Any of the three gradients may be absent. foreground and background are read for alpha's gradient alone.
struct BlendBackward {
  DType dtype;
  std::int64_t rows, background_rows, size;
  Rows grad, foreground, background;
  Optional<const std::int64_t> index;
  Alpha alpha;
  Rows grad_foreground, grad_background;  // [rows, size], [background_rows, size]
  Optional<double> grad_alpha;            // [rows]
  // Workspaces of the caller, needed only where named.
  double* partial;            // [rows, blend_chunks(size)] for grad_alpha
  Optional<const std::int64_t> start;  // [background_rows + 1] and
  const std::int64_t* order;  // [rows]: background row n serves the samples order[start[n]] ... order[start[n + 1] - 1];
                              // without `start` every background row n serves sample n alone
  int threads;
  bool stream = false;
};

// Elements of a sample that are worked on at once.
inline constexpr std::int64_t kBlendChunk = 16384;
constexpr std::int64_t blend_chunks(std::int64_t size) { return (size + kBlendChunk - 1) / kBlendChunk; }

// Boxes: a mask [batch, height, width] of the pixels whose centre lies in any of a sample's boxes.
struct BoxMask {
  std::int64_t batch, boxes, height, width;
  const double* box;   // [batch, boxes, 4], x1 y1 x2 y2 in pixels
  std::uint8_t* mask;  // 1 inside, 0 outside
  int threads;
};

// out = mask == replaced ? fill : images, elements moved as raw bits.
struct BoxFill {
  std::int64_t item;  // bytes of an element: 1, 2, 4, 8
  std::int64_t batch, channels, pixels;
  std::int64_t batch_stride, channel_stride, pixel_stride;  // of images, in elements
  std::int64_t out_batch_stride, out_channel_stride, out_pixel_stride;
  const void* images;
  const std::uint8_t* mask;  // [batch, pixels]
  std::uint8_t replaced;
  const void* fill;  // [batch or 1, channels]
  std::int64_t fill_stride;  // between samples: channels or 0
  void* out;
  int threads;
};

struct BlendTable {
  void (*forward)(const BlendForward&);
  void (*backward)(const BlendBackward&);
  void (*box_mask)(const BoxMask&);
  void (*box_fill)(const BoxFill&);
};

FEDKERN_DECLARE_TABLE(BlendTable, blend)

}  // namespace fedkern
