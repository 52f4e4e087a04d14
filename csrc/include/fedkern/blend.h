// blend: out[b] = alpha[b] * foreground[b] + (1 - alpha[b]) * background[index[b]]
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

struct BlendForward {
  DType dtype;
  std::int64_t rows, size;              // B, and elements of one sample (dense in memory, any order of axes)
  const void* foreground;               // [rows, size], row stride in elements
  std::int64_t foreground_stride;
  const void* background;               // [background_rows, size]
  std::int64_t background_stride;
  const std::int64_t* index;            // [rows] into background, or null for the identity
  const double* alpha;                  // [rows], or null for alpha_value
  double alpha_value;
  void* out;                            // [rows, size], row stride `size`
  int threads;
};

struct BlendTable {
  void (*forward)(const BlendForward&);
};

FEDKERN_DECLARE_TABLE(BlendTable, blend)

}  // namespace fedkern
