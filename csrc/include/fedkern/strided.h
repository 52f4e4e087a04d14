// strided: grouped 4x4 convolution of stride 2 and padding 1, forward and backward.
//
// Maps are dense and channels-last, fp32. A group's samples are worked on in parts of fixed sizes, whose sums are added in order:
// results do not depend on the number of threads. There is no portable level: where it is active, nothing fits.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

struct StridedShape {
  std::int64_t batch, height, width, groups, in, out;  // of x; in, out: channels of a group
  // Rows and columns of the convolution's result.
  std::int64_t high() const { return height / 2; }
  std::int64_t wide() const { return width / 2; }
};

struct StridedConv {
  StridedShape shape;
  const float* x;       // [batch, height, width, groups * in]
  const float* weight;  // [groups * out, in, 4, 4]
  int threads;
};

struct StridedTable {
  // Whether the kernel is faster than PyTorch's; null: nowhere.
  bool (*fits)(const StridedShape&);
  // y: [batch, high, wide, groups * out]. False where an infinity or NaN is met, whose products with the border's zeros would be NaN.
  bool (*forward)(const StridedConv&, float* y);
  // grad is like y, to_x and to_weight like x and weight; null: not wanted.
  bool (*backward)(const StridedConv&, const float* grad, float* to_x, float* to_weight);
};

FEDKERN_DECLARE_TABLE(StridedTable, strided)

}  // namespace fedkern
