// What the fuse cores take from Python: feature maps, and scale and shift.
#pragma once

#include <vector>

#include "exchange.h"

namespace fedkern {

// A map [B, C, *positions], its positions as one axis. Strides are in elements.
struct MapView {
  TensorView tensor;
  DType dtype = DType::f32;
  std::int64_t positions = 1, step = 1;  // step: from position to position
  bool even = true;                      // one step leads through all positions

  explicit MapView(py::handle given) : tensor(checked_view(given.ptr())) {
    if (!tensor.floating(dtype)) throw py::type_error("fedkern's kernels take floating tensors");
    require(tensor.dims >= 2, "maps must be [B, C, *positions]");
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
  // The other map of a call, of any number of channels.
  const MapView& beside(const MapView& other) const {
    require(dtype == other.dtype && tensor.same_device(other.tensor) && batch() == other.batch() && tensor.same_shape(other.tensor, 2),
            "maps differ in dtype, device, batch or positions");
    return *this;
  }
};

// A call's maps have `each` channels, `all` together; what they are made into has all, or in a mean as many as each.
inline void check_channels(const std::vector<std::int64_t>& each, std::int64_t result, bool mean) {
  require(!each.empty(), "fuse takes at least one map");
  std::int64_t all = 0;
  for (const std::int64_t one : each) require(one >= 0 && (!mean || one == result), "maps of a mean differ in channels"), all += one;
  require(mean || all == result, "the result has not the channels of all maps");
}

// What a backward pass reads: the maps for scale's gradient and through a mean's ReLU, through another ReLU the maps or the result.
inline void check_reads(bool maps, bool result, bool to_scale, bool relu, bool mean) {
  require(maps || (!to_scale && !(relu && (mean || !result))), "the gradient of fuse needs its maps or its result");
}

// Reads scale or shift of all maps' channels, or None; false where it has gaps or another dtype than maps are computed in.
inline bool read_vector(py::handle given, const MapView& map, std::int64_t channels, Optional<const void>& to) {
  if (given.is_none()) return true;
  const TensorView vector = checked_view(given.ptr());
  const DType dtype = map.dtype;
  require(vector.dims == 1 && vector.shape[0] == channels && vector.same_device(map.tensor), "scale and shift have a number for each channel of all maps");
  to = {vector.data, true};
  return vector.code == 2 && vector.bits == (dtype == DType::f64 ? 64 : 32) && vector.contiguous();
}

// A dense fp64 tensor of so many elements, or None.
inline Optional<double> read_doubles(py::handle given, std::int64_t elements) {
  if (given.is_none()) return {};
  const TensorView seen = checked_view(given.ptr());
  require(seen.code == 2 && seen.bits == 64 && seen.dims == 1 && seen.shape[0] == elements && seen.contiguous(), "sums of fuse are float64, one for each channel");
  return {static_cast<double*>(seen.data), true};
}

}  // namespace fedkern
