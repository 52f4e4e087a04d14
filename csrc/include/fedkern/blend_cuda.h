// blend and boxes on CUDA: the contract of blend.h, on a device and a stream of the caller's.
#pragma once

#include "fedkern/blend.h"

namespace fedkern::cuda {

// Device pointers throughout. An index out of range stops the kernel with a device assertion.
void blend_forward(const BlendForward& call, std::int64_t background_rows, int device, void* stream);

// As BlendBackward says, with `start` and `order` on the device; needs no `partial`, for grad_alpha is [rows, blend_chunks(size)]:
// sums of parts.
void blend_backward(const BlendBackward& call, int device, void* stream);

// Finds `start` and `order` of BlendBackward; meant for at most kBlendFew rows and background rows.
void blend_users(const std::int64_t* index, std::int64_t rows, std::int64_t* start, std::int64_t background_rows, std::int64_t* order, int device,
                 void* stream);
inline constexpr std::int64_t kBlendFew = 2048;

// out = (the pixel's centre lies in any box of its sample) != keep ? fill : images, elements moved as raw bits.
struct FillBoxes {
  std::int64_t item;  // bytes of an element: 1, 2, 4, 8
  std::int64_t batch, boxes, channels, height, width;
  std::int64_t stride[4], out_stride[4];  // of batch, channel, row and column, in elements
  const void* images;
  const double* box;         // [batch, boxes, 4], x1 y1 x2 y2 in pixels; one with a NaN is empty
  const void* fill;          // [batch or 1, channels]
  std::int64_t fill_stride;  // between samples: channels or 0
  bool keep;
  void* out;
};
void fill_boxes(const FillBoxes& call, int device, void* stream);

}  // namespace fedkern::cuda
