// What the fuse cores take from Python: feature maps, and scale and shift.
#pragma once

#include "exchange.h"

namespace fedkern {

// A checked map [B, C, *positions], its positions as one axis. Strides are in elements.
struct MapView {
  TensorView tensor;
  DType dtype = DType::f32;
  std::int64_t positions = 1, step = 1;  // step: from position to position
  bool even = true;                      // one step leads through all positions

  explicit MapView(py::handle given) : tensor(checked_view(given.ptr())) {
    if (!tensor.floating(dtype)) throw py::type_error("fedkern's kernels take floating tensors");
    for (int d = tensor.dims - 1; d >= 2; --d) {
      if (tensor.shape[d] == 1) continue;
      if (positions == 1)
        step = tensor.strides[d];
      else if (tensor.strides[d] != step * positions)
        even = false;
      positions *= tensor.shape[d];
    }
    even = even || tensor.empty();
  }
  std::int64_t batch() const { return tensor.shape[0]; }
  std::int64_t channels() const { return tensor.shape[1]; }
  std::int64_t batch_stride() const { return tensor.strides[0]; }
  std::int64_t channel_stride() const { return tensor.strides[1]; }
};

// Reads scale or shift, or None; false where it has gaps or another dtype than maps of `dtype` are computed in.
inline bool read_vector(py::handle given, DType dtype, Optional<const void>& to) {
  if (given.is_none()) return true;
  const TensorView vector = checked_view(given.ptr());
  to = {vector.data, true};
  return vector.code == 2 && vector.bits == (dtype == DType::f64 ? 64 : 32) && vector.contiguous();
}

// A dense fp64 tensor, or None.
inline Optional<double> read_doubles(py::handle given) {
  if (given.is_none()) return {};
  return {static_cast<double*>(checked_view(given.ptr()).data), true};
}

}  // namespace fedkern
