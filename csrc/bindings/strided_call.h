// Tensors of strided as Python passes them: fp32 on the CPU, maps channels-last (contiguous ones are laid out anew), the weight
// contiguous.
#pragma once

#include "exchange.h"
#include "fedkern/strided.h"

namespace fedkern {

// The shape of a call, or a batch of 0 where what is given does not make one.
inline StridedShape strided_shape(const TensorView& x, const TensorView& weight, long groups) {
  const auto fits = [](const TensorView& seen) { return seen.dims == 4 && seen.code == 2 && seen.bits == 32 && seen.device_type == TensorView::kCpu; };
  const bool fit = fits(x) && fits(weight) && groups > 0 && (x.channels_last() || x.contiguous()) && weight.contiguous() && weight.shape[0] % groups == 0 &&
                   weight.shape[1] * groups == x.shape[1] && weight.shape[2] == 4 && weight.shape[3] == 4;
  return fit ? StridedShape{x.shape[0], x.shape[2], x.shape[3], groups, weight.shape[1], weight.shape[0] / groups} : StridedShape{};
}

}  // namespace fedkern
