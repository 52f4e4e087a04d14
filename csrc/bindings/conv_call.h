// Tensors of conv as Python passes them: fp32 on the CPU, maps channels-last.
#pragma once

#include <algorithm>

#include "exchange.h"
#include "fedkern/conv.h"

namespace fedkern {

inline bool is_f32(const TensorView& seen) { return seen.code == 2 && seen.bits == 32 && seen.device_type == TensorView::kCpu; }

// The shape of a call, or a batch of 0 where what is given does not make one.
inline ConvShape conv_shape(const TensorView& x, const TensorView& weight, long stride) {
  const bool fit = (stride == 1 || stride == 2) && x.dims == 4 && weight.dims == 4 && is_f32(x) && is_f32(weight) && weight.shape[1] == x.shape[1] &&
                   (weight.shape[2] == 3 || weight.shape[2] == 1) && weight.shape[3] == weight.shape[2] && (weight.contiguous() || weight.channels_last());
  return fit ? ConvShape{x.shape[0], x.shape[2], x.shape[3], x.shape[1], weight.shape[0], stride, weight.shape[2]} : ConvShape{};
}

// The same of a convolution with bias and pooling.
inline PoolShape pool_shape(const TensorView& x, const TensorView& weight, long padding) {
  const bool fit = x.dims == 4 && weight.dims == 4 && is_f32(x) && is_f32(weight) && weight.shape[1] == x.shape[1] && weight.shape[3] == weight.shape[2] &&
                   (x.contiguous() || x.channels_last()) && (weight.contiguous() || weight.channels_last());
  return fit ? PoolShape{x.shape[0], x.shape[2], x.shape[3], x.shape[1], weight.shape[0], weight.shape[2], padding} : PoolShape{};
}

// Channels of what a call keeps for its backward pass; 0 where the kernel does not take it. Those of a group norm are its own, and
// one tap of many weights needs many positions to be faster than PyTorch's.
inline std::int64_t kept_channels(const ConvShape& s, long groups) {
  const auto served = conv_kernels().served;
  if (!served || !s.batch) return 0;
  const ConvShape wide = served(s);
  if (!groups) return wide.out;
  if (groups < 0 || s.out % groups || wide.out != s.out) return 0;
  return s.kernel == 1 && s.in * s.out > std::max<std::int64_t>(16384, 32 * s.result().positions()) ? 0 : s.out;
}

// Whether a tensor is a map of a call: [batch, channels, height, width], halved where `pool`; of any strides.
inline bool is_map(const TensorView& seen, const ConvShape& s, std::int64_t channels, bool pool) {
  return seen.dims == 4 && is_f32(seen) && seen.shape[0] == s.batch && seen.shape[1] == channels && seen.shape[2] == s.height / (pool ? 2 : 1) &&
         seen.shape[3] == s.width / (pool ? 2 : 1);
}

inline bool is_vector(const TensorView& seen, std::int64_t size) {
  return seen.dims == 1 && is_f32(seen) && seen.shape[0] == size && seen.contiguous();
}

}  // namespace fedkern
