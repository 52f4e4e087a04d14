// blend on CUDA: the contract of blend.h, on a device and a stream of the caller's.
#pragma once

#include "fedkern/blend.h"

namespace fedkern::cuda {

// Device pointers throughout. An index out of range stops the kernel with a device assertion.
void blend_forward(const BlendForward& call, std::int64_t background_rows, int device, void* stream);

// As BlendBackward says, with `start` and `order` on the device; needs no `partial`.
void blend_backward(const BlendBackward& call, int device, void* stream);

}  // namespace fedkern::cuda
